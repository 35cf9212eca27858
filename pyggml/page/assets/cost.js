// What is slow or heavy: steps as strips, layer after layer, by time, bytes or flops.

const FAMILIES = [["blue", "products with weights"], ["orange", "attention"], ["green", "copies"], ["grey", "other"]];
const METRICS = {
  seconds: ["time", time, "seconds"],
  traffic: ["bytes read and written", bytes, "bytes"],
  flops: ["floating-point operations", flops, "flops"],
};
const cost = { metric: "", strips: [], order: [] };

function family(plan, step) {
  const ops = plan.steps.nodes[step].map((n) => plan.op(n));
  if (ops.some((op) => /attn|soft_max/.test(op)) || (ops.includes("loop") && /attn|soft_max/.test(plan.text(plan.steps.body[step])))) return 1;
  if (ops.some((op) => /mul_mat|up_gate/.test(op))) return 0;
  return ops.includes("transfer") ? 2 : 3;
}

function showCost() {
  const { plan } = state;
  const metrics = Object.keys(METRICS).filter((key) => plan.steps[key]);
  if (!metrics.includes(cost.metric)) cost.metric = metrics[0];
  const [what, text] = METRICS[cost.metric];
  const values = plan.steps[cost.metric];
  const all = sum(values);
  const choice = make("fieldset", { class: "choice", style: { margin: "0.25rem 0" } }, make("legend", {}, "Width"),
    metrics.map((key) => make("label", {}, make("input", { type: "radio", name: "metric", value: key, checked: key === cost.metric,
      on: { change: () => { cost.metric = key; showCost(); markCost(); } } }), METRICS[key][0])));
  const groups = byWhere(plan);
  cost.order = groups.flatMap((group) => group.steps);
  cost.starts = new Map();
  cost.order.reduce((at, s) => (cost.starts.set(s, at), at + values[s]), 0);
  const source = plan.timed ? "" : " Times appear here with plan.page(path, profile=plan.profile(..)) or pyggml page --profile.";
  const byOp = opRows(plan, values);
  fill("cost",
    make("p", {}, `${text(all)} in one run: ${what} of each step, ${cost.metric === "seconds" ? "measured inside complete runs" : "the least that its definition needs"}.${source}`),
    choice,
    make("div", { id: "cost-chart" }),
    make("p", { id: "cost-readout", class: "readout" }, all ? "" : "Every step has 0."),
    legend(FAMILIES),
    table("By op.", ["op", ["steps", "num"], [what, "num"], ["share", "num"], ""], byOp.slice(0, 12).map(([op, [count, value]]) => ({ cells: [
      make("span", { class: "mono" }, op), number.format(count), text(value), percent(value, all), shareBar(value, all)] }))),
    slowPaths(plan, values, what, text, all),
    make("details", { class: "plain" }, make("summary", {}, "By layer, as a table"), make("div", { class: "inside" },
      table("Layers in order.", ["part", ["steps", "num"], [what, "num"], ["share", "num"], ""],
        groups.map(({ where, steps }) => {
          const value = sum(steps.map((s) => values[s]));
          return { cells: [make("button", { type: "button", class: "link", on: { click: () => openStep(steps[0]) } }, where), number.format(steps.length), text(value), percent(value, all), shareBar(value, all)] };
        })))));
  if (all) drawCost(plan, values, all, groups);
}

const shareBar = (part, all) => make("span", { class: "share", "aria-hidden": "true", style: { width: `${(6 * part / all).toFixed(2)}rem` } });

/** The steps of each layer together, in the order of the layers. */
function byWhere(plan) {
  const groups = [];
  for (const section of plan.sections) {
    section.steps.forEach((steps, i) => groups.push({
      where: section.layers.length ? `layer ${section.layers[i]}` : section.name,
      rank: section.name === "input" ? -1 : section.layers.length ? section.layers[i] : Infinity, steps }));
  }
  return groups.sort((a, b) => a.rank - b.rank);
}

function opRows(plan, values) {
  const rows = new Map();
  plan.steps.op.forEach((name, s) => {
    const op = plan.isCopy(s) ? "copy" : plan.text(name);
    const [count, value] = rows.get(op) || [0, 0];
    rows.set(op, [count + 1, value + values[s]]);
  });
  return [...rows].sort((a, b) => b[1][1] - a[1][1]);
}

/** Why steps do not take the fast kernel, the reason with the most cost first. */
function slowPaths(plan, values, what, text, all) {
  const groups = new Map();
  for (let s = 0; s < plan.count; s += 1) {
    const why = plan.why(s);
    if (why) groups.set(why, [...(groups.get(why) || []), s]);
  }
  if (!groups.size) return plan.named ? make("p", {}, "Every step takes the fastest kernel that its backend has for it.") : null;
  const cost = (steps) => sum(steps.map((s) => values[s]));
  const rows = [...groups].sort((a, b) => cost(b[1]) - cost(a[1])).map(([why, steps]) => ({ cells: [
    make("span", {}, why), make("span", { class: "mono" }, [...new Set(steps.map((s) => plan.text(plan.steps.op[s])))].join(", ")),
    number.format(steps.length), text(cost(steps)), percent(cost(steps), all),
    make("button", { type: "button", class: "link", on: { click: () => openStep(steps[0]) } }, `step ${steps[0]}`)] }));
  return table("Slow paths: why steps do not take the fast kernel.", ["why", "ops", ["steps", "num"], [what, "num"], ["share", "num"], "the first"], rows);
}

/** Steps side by side, each as wide as its value; `total` is the width of the strip. */
function strip(plan, steps, values, total) {
  const paths = FAMILIES.map(() => []);
  let left = 0;
  for (const s of steps) {
    const width = 1000 * values[s] / total;
    if (width) paths[family(plan, s)].push(rectangle(+left.toFixed(3), 0, +width.toFixed(3), 1));
    left += width;
  }
  const under = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    let rest = total * (event.clientX - box.left) / box.width;
    return steps.find((s) => (rest -= values[s]) < 0) ?? steps.at(-1);
  };
  const on = { click: (event) => setStep(under(event)), mousemove: (event) => costReadout(under(event)), mouseleave: () => costReadout(state.step) };
  return make("svg", { class: "gap", viewBox: "0 0 1000 1", preserveAspectRatio: "none", height: "40", on },
    paths.map((rects, k) => make("path", { class: `${FAMILIES[k][0]} ${steps.length <= 160 ? "parted" : ""}`, d: rects.join("") })));
}

/** The strip of all layers, and below it that of the current step's layer. */
function drawCost(plan, values, all, groups) {
  const sumOf = (steps) => sum(steps.map((s) => values[s]));
  const whole = strip(plan, cost.order, values, all);
  let edge = 0;
  const edges = groups.map(({ steps }) => `M${(edge += 1000 * sumOf(steps) / all).toFixed(3)} 0V1`).join("");
  if (groups.length <= 130) whole.append(make("path", { class: "edge", d: edges }));
  whole.append(make("path", { class: "cursor", d: "" }));
  cost.draw = () => {
    const where = plan.where(state.step);
    const { steps } = groups.find((group) => group.where === where);
    const total = sumOf(steps) || 1;
    const layer = strip(plan, steps, values, total);
    const before = sumOf(steps.slice(0, steps.indexOf(state.step)));
    layer.append(make("path", { class: "cursor", d: `M${1000 * (before + values[state.step] / 2) / total} 0V1` }));
    whole.lastElementChild.setAttribute("d", `M${1000 * (cost.starts.get(state.step) + values[state.step] / 2) / all} 0V1`);
    const parts = groups.length > 1 ? [make("div", { class: "lane" }, "all layers"), whole] : [];
    byId("cost-chart").replaceChildren(make("div", { class: "chart", "aria-hidden": "true" }, parts, make("div", { class: "lane" }, where), layer));
    costReadout(state.step);
  };
}

function costReadout(step) {
  const { plan } = state;
  const values = plan.steps[cost.metric];
  const [, text] = METRICS[cost.metric];
  byId("cost-readout").replaceChildren(`Step ${step}, `, make("span", { class: "mono" }, plan.title(step)),
    `, ${plan.where(step)}: ${text(values[step])}, ${percent(values[step], sum(values))} of the run. `,
    make("button", { type: "button", class: "link", on: { click: () => openStep(step) } }, "Show it in the graph"));
}

function markCost() {
  if (cost.draw && sum(state.plan.steps[cost.metric])) cost.draw();
}
