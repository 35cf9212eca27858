// What runs where: a lane of splits for each place, and the copies between devices.

const lanes = { charts: [] };

function showDevices() {
  const { plan } = state;
  const notes = [];
  if (!plan.fused) notes.push("Compiled with fuse=False: each node is a step.");
  if (plan.copied_parts) notes.push(`${plural(plan.copied_parts, "part")} of concats copied: the others are written in place.`);
  const expanded = plan.expanded.map(([op, place, reason, count]) => make("p", {}, `${count} × ${op} in simpler ops on ${place}: ${reason}.`));
  const used = [...new Set(plan.splits.map((split) => split[0]))];
  lanes.charts = [];
  if (plan.splits.length < 2) {
    return fill("devices",
      make("p", {}, `All ${plural(plan.count, "step")} run on ${plan.places[used[0] ?? 0]} in one split. Nothing is copied between devices. `, notes.join(" ")), expanded);
  }
  const rows = used.flatMap((place) => {
    const steps = runs(plan, (s) => plan.home[s] === place && !plan.isCopy(s));
    const copies = runs(plan, (s) => plan.home[s] === place && plan.isCopy(s));
    const chart = make("svg", { class: "gap", viewBox: `0 0 ${plan.count} 1`, preserveAspectRatio: "none", height: "30", on: { click: (event) => setStep(laneStep(event)) } },
      make("path", { class: "blue", d: steps }), make("path", { class: "green", d: copies }), make("path", { class: "cursor", d: "" }));
    lanes.charts.push(chart);
    return [make("div", { class: "lane" }, plan.places[place]), chart];
  });
  const copies = copyGroups(plan);
  fill("devices",
    make("p", {}, `${plural(plan.splits.length, "split")} on ${plural(used.length, "place")}. `, notes.join(" ")), expanded,
    make("div", { class: "chart", "aria-hidden": "true" }, rows),
    legend([["blue", "steps"], ["green", "copies that arrive"]]),
    table("Steps by place.", ["place", ["splits", "num"], ["steps", "num"], ["of them copies", "num"], ["bytes copied", "num"]], used.map((place) => {
      const own = plan.splits.filter((split) => split[0] === place);
      const arrived = copies.filter((group) => group.to === place);
      return { cells: [plan.places[place], `${own.length}`, number.format(sum(own.map((s) => s[1] + s[2]))), number.format(sum(arrived.map((g) => g.steps.length))), size(sum(arrived.map((g) => g.bytes * g.steps.length)))] };
    })),
    copies.length ? table(`${plural(sum(copies.map((g) => g.steps.length)), "copy", "copies")} between devices in each run.`,
      ["tensor", "from", "to", ["times", "num"], ["each", "num"], ["all", "num"]],
      copies.map((group) => ({ cells: [
        make("button", { type: "button", class: "link mono", on: { click: () => openStep(group.steps[0]) } }, group.name),
        plan.places[group.from], plan.places[group.to], number.format(group.steps.length), size(group.bytes), size(group.bytes * group.steps.length)] })))
      : make("p", {}, "Nothing is copied between devices."));
}

/** Rectangles over the steps that `has` accepts. */
function runs(plan, has) {
  let path = "";
  for (let s = 0; s < plan.count; s += 1) {
    const first = s;
    while (s < plan.count && has(s)) s += 1;
    if (s > first) path += rectangle(first, 0, s - first, 1);
  }
  return path;
}

function laneStep(event) {
  const box = event.currentTarget.getBoundingClientRect();
  const step = Math.floor(state.plan.count * (event.clientX - box.left) / box.width);
  return Math.min(state.plan.count - 1, Math.max(0, step));
}

/** Copies of equal tensors of different layers together, in the order of the first. */
function copyGroups(plan) {
  const groups = new Map();
  for (let s = 0; s < plan.count; s += 1) {
    if (!plan.isCopy(s)) continue;
    const node = plan.steps.node[s];
    const source = plan.nodes.src[node][0];
    const named = nameOf(plan, source);
    const key = [data.texts[plan.nodes.name[named]] || plan.name(source), plan.nodes.place[source], plan.home[s], plan.nodes.bytes[node]];
    const group = groups.get(key.join("\n")) || { name: key[0].replaceAll(LAYER, "N"), from: key[1], to: key[2], bytes: key[3], steps: [] };
    group.steps.push(s);
    groups.set(key.join("\n"), group);
  }
  return [...groups.values()];
}

/** The node that a view shows. */
function nameOf(plan, node) {
  return plan.label(node) ? node : plan.base(node);
}

function markDevices() {
  for (const chart of lanes.charts) chart.lastElementChild.setAttribute("d", `M${state.step + 0.5} 0V1`);
}
