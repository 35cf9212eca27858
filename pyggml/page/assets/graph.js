// The graph by layer: layers that are alike once, with a count; each step opens to its details.

const ROWS = 200; // steps of a list that are shown at once
const graph = { details: [], shown: [] };

function showGraph() {
  const { plan } = state;
  const repeated = plan.sections.filter((section) => section.layers.length > 1);
  const input = make("input", { type: "search", id: "find", placeholder: "tensor, op, kernel, type or file", on: { input: (event) => find(event.target.value) } });
  graph.shown = plan.sections.map(() => 0);
  graph.details = plan.sections.map((section, k) => make("details", { id: `section-${k}`, on: { toggle: (event) => event.target.open && !event.target.querySelector(".step") && draw(k) } },
    make("summary", {}, summary(plan, section)), make("div", { class: "inside" })));
  fill("graph",
    make("p", {}, `${plural(plan.count, "step")} compute ${plural(plan.nodes.op.length, "node")}. `,
      repeated.length ? "Layers whose steps have the same ops, attributes, types, sizes, places and kernels are listed once. " : "",
      "The lines at the left lead from each step to those that read its result."),
    make("div", { class: "tools" }, make("label", { for: "find" }, "Find"), input),
    make("ul", { class: "found", id: "found", "aria-live": "polite" }),
    graph.details);
  if (plan.sections.length === 1) graph.details[0].open = true;
}

function summary(plan, section) {
  const n = section.layers.length;
  const name = n > 1 ? `Layers ${ranges(section.layers)}` : n ? `Layer ${section.layers[0]}` : { input: "Before the layers", output: "After the layers", graph: "All steps" }[section.name];
  const first = section.steps[0];
  const places = [...new Set(first.map((s) => plan.places[plan.home[s]]))].join(", ");
  const parts = [];
  if (n > 1) parts.push(`${n} times`);
  parts.push(`${plural(first.length, "step")}${n > 1 ? " each" : ""}`, places);
  if (plan.timed) {
    const total = sum(section.steps.flat().map((s) => plan.steps.seconds[s]));
    parts.push(n > 1 ? `${time(total)}, ${time(total / n)} each` : time(total));
  } else parts.push(`${bytes(sum(first.map((s) => plan.steps.traffic[s])))} read and written${n > 1 ? " each" : ""}`);
  return [make("b", {}, name), make("span", { class: "soft" }, parts.join(" · "))];
}

/** Fill a section with the steps of the layer that is chosen in it. */
function draw(k, all = false) {
  const { plan } = state;
  const section = plan.sections[k];
  const steps = section.steps[graph.shown[k]];
  const choice = section.layers.length < 2 ? null : make("div", { class: "tools" }, make("label", {}, "Show layer ",
    make("select", { on: { change: (event) => { graph.shown[k] = Number(event.target.value); draw(k); } } },
      section.layers.map((layer, i) => make("option", { value: i, selected: i === graph.shown[k] }, `${layer}`)))));
  const { rows, lanes } = rails(plan, steps);
  const heads = ["", "step", "result and op", "type and ne", "place", "kernel", "bytes", ...(plan.timed ? ["time"] : [])];
  const shown = all ? steps : steps.slice(0, ROWS);
  const list = make("div", { class: `steps${plan.timed ? "" : " untimed"}`, role: "table", "aria-label": "Steps", style: { "--rails": `${railWidth(lanes)}px` } },
    make("div", { class: "step head", role: "row" }, heads.map((head) => make("span", { role: "columnheader", class: head === "bytes" || head === "time" ? "num" : null }, head))),
    shown.map((s, i) => stepRow(plan, s, rows[i])));
  const more = steps.length - shown.length;
  graph.details[k].lastElementChild.replaceChildren(...[choice, list,
    more ? make("button", { type: "button", on: { click: () => draw(k, true) } }, `Show ${plural(more, "more step")}`) : null].filter(Boolean));
}

function stepRow(plan, s, rail) {
  const node = plan.steps.node[s];
  const kernels = plan.kernels(s);
  const label = plan.label(node);
  const title = label && !plan.isCopy(s) ? label : plan.title(s);
  const button = make("button", { type: "button", class: "link", "aria-expanded": "false", id: `step-${s}`, on: { click: () => toggle(s) } }, title);
  return make("div", { class: "step", role: "row", id: `row-${s}` },
    make("div", { class: "rail", role: "cell" }, drawRail(rail)),
    make("div", { class: "number soft", role: "cell" }, `${s}`),
    make("div", { class: "what", role: "cell" }, button, make("div", { class: "call" }, plan.call(s))),
    make("div", { class: "spec mono", role: "cell" }, plan.spec(node)),
    make("div", { class: "where", role: "cell" }, plan.places[plan.home[s]]),
    make("div", { class: "kernel mono", role: "cell" }, kernels.slice(0, 3).map((name) => make("div", { title: name }, name)),
      kernels.length > 3 ? make("div", { class: "soft" }, `and ${kernels.length - 3} more`) : null,
      plan.why(s) ? make("div", { class: "slow", title: plan.why(s) }, "slow path") : null),
    make("div", { class: "size num", role: "cell" }, plan.steps.at[s] < 0 ? make("span", { class: "soft" }, "in place") : size(plan.nodes.bytes[node])),
    plan.timed ? make("div", { class: "time num", role: "cell" }, time(plan.steps.seconds[s])) : null);
}

/** Open or close the details of a step. */
function toggle(s, open) {
  const row = byId(`row-${s}`);
  const more = row.querySelector(".more");
  const show = open ?? !more;
  if (more && !show) more.remove();
  if (!more && show) row.append(details(state.plan, s));
  byId(`step-${s}`).setAttribute("aria-expanded", show);
  if (show) setStep(s);
}

const stepLink = (step, text) => make("button", { type: "button", class: "link", on: { click: () => openStep(step) } }, text);

/** A tensor that a step reads: its name leads to the step that computes it. */
function tensorItem(plan, n) {
  const maker = plan.maker.get(plan.base(n));
  const view = plan.nodes.base[n] >= 0 ? ` (${plan.op(n)})` : "";
  const name = maker === undefined ? make("span", { class: "mono" }, plan.name(n)) : stepLink(maker, plan.name(n));
  const kind = maker === undefined ? `, ${plan.op(plan.base(n))}` : "";
  return make("li", {}, name, make("span", { class: "soft" }, `${view} ${plan.spec(n)}, ${bytes(plan.nodes.bytes[n])} on ${plan.places[plan.nodes.place[n]]}${kind}`));
}

/** A node that a step computes. */
function nodeItem(plan, n) {
  return make("li", {}, make("span", { class: "mono" }, plan.label(n) ? `${plan.label(n)} = ${plan.op(n)}` : plan.op(n)),
    make("span", { class: "soft" }, ` ${plan.spec(n)}${attributes(plan, n)}, built at ${plan.line(n) || "an unknown line"}`));
}

/** The steps that read a step's result, at most 12 of them. */
function userItems(plan, s) {
  const users = [...new Set(plan.steps.nodes[s].flatMap((n) => plan.users.get(n) || []))].filter((user) => user !== s).sort((a, b) => a - b);
  const items = users.slice(0, 12).map((user) => make("li", {}, stepLink(user, plan.title(user)), make("span", { class: "soft" }, ` step ${user}, ${plan.where(user)}`)));
  return users.length > 12 ? [...items, make("li", {}, `and ${users.length - 12} more`)] : items;
}

function details(plan, s) {
  const node = plan.steps.node[s];
  const list = (items) => (items.length ? make("ul", {}, items) : "none");
  const mono = (text) => make("li", { class: "mono" }, text);
  const outputs = Object.entries(plan.outputs).filter(([, n]) => plan.steps.nodes[s].includes(plan.base(n))).map(([name]) => name);
  const body = plan.text(plan.steps.body[s], plan.nodes.layer[node]);
  const place = plan.steps.at[s] >= 0 ? `byte ${number.format(plan.steps.at[s])} of the arena of ${plan.places[plan.home[s]]}` : `in the memory of ${plan.name(root(plan, node))}`;
  const entries = [
    ["Built at", make("code", {}, plan.line(node) || "an unknown line")],
    [plan.steps.nodes[s].length > 1 ? "Nodes, in one step" : "Node", list(plan.steps.nodes[s].map((n) => nodeItem(plan, n)))],
    body ? ["Each piece", list(body.split("\n").map(mono))] : null,
    ["Kernels", list(plan.kernels(s).map(mono))],
    plan.why(s) ? ["Why not a faster one", plan.why(s)] : null,
    ["Reads", list(plan.steps.reads[s].map((n) => tensorItem(plan, n)))],
    ["Read by", list(userItems(plan, s))],
    outputs.length ? ["Output", outputs.join(", ")] : null,
    ["Memory", `${bytes(plan.nodes.bytes[node])}, ${place}${plan.steps.scratch[s] ? `; ${bytes(plan.steps.scratch[s])} of scratch` : ""}`],
    ["Cost", `${bytes(plan.steps.traffic[s])} read and written, ${flops(plan.steps.flops[s])}${plan.timed ? `, ${rates(plan, s)}` : ""}`],
    ["Split", `${plan.steps.split[s]} on ${plan.places[plan.home[s]]}`],
  ];
  return make("div", { class: "more", role: "cell" }, make("dl", {}, entries.filter(Boolean).map(([term, value]) => [make("dt", {}, term), make("dd", {}, value)])));
}

const attributes = (plan, n) => (plan.nodes.attrs[n] ? ` (${plan.text(plan.nodes.attrs[n])})` : "");

function rates(plan, s) {
  const seconds = plan.steps.seconds[s];
  const per = (value, unit) => (seconds ? scaled(value / seconds, unit, 1000) : "");
  return `${time(seconds)}: ${per(plan.steps.traffic[s], ["B/s", "kB/s", "MB/s", "GB/s", "TB/s"])}, ${per(plan.steps.flops[s], ["flop/s", "kflop/s", "Mflop/s", "Gflop/s", "Tflop/s"])}`;
}

/** The leaf that a node writes into. */
function root(plan, node) {
  while (plan.nodes.src[node].length && plan.maker.has(node)) node = plan.nodes.src[node][0];
  return node;
}

/** Show a step in the graph: open its layer and its details, and focus it. */
function openStep(s) {
  const [k, i] = state.plan.section[s];
  graph.shown[k] = i;
  graph.details[k].open = true;
  draw(k, true);
  toggle(s, true);
  byId(`row-${s}`).scrollIntoView({ block: "start" });
  byId(`step-${s}`).focus({ preventScroll: true });
}

function markGraph() {
  document.querySelector(".step.now")?.classList.remove("now");
  byId(`row-${state.step}`)?.classList.add("now");
}

/** List the steps in which all words occur. */
function find(text) {
  const { plan } = state;
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const hits = [];
  if (words.length) {
    for (let s = 0; s < plan.count; s += 1) {
      const node = plan.steps.node[s];
      const all = [plan.title(s), plan.call(s), plan.text(plan.steps.kernels[s]), plan.why(s), plan.spec(node), plan.places[plan.home[s]], plan.where(s),
        ...plan.steps.nodes[s].flatMap((n) => [plan.op(n), plan.label(n), plan.line(n)])].join(" ").toLowerCase();
      if (words.every((word) => all.includes(word))) hits.push(s);
    }
  }
  const items = hits.slice(0, 20).map((s) => make("li", {}, make("button", { type: "button", class: "link mono", on: { click: () => openStep(s) } }, plan.title(s)),
    make("span", { class: "soft" }, ` step ${s}, ${plan.where(s)}, ${plan.places[plan.home[s]]}${plan.kernels(s).length ? `, ${plan.kernels(s)[0]}` : ""}`)));
  const rest = hits.length - items.length;
  byId("found").replaceChildren(...items, ...(words.length && !hits.length ? [make("li", {}, "No step has all these words.")] : []),
    ...(rest > 0 ? [make("li", { class: "soft" }, `and ${rest} more; add a word`)] : []));
}
