// The arena of a device over the steps: its blocks, the live bytes, and the owners of a step's memory.

const KINDS = [["blue", "tensors"], ["orange", "attention scores, expanded K and V"], ["grey", "scratch of a kernel"], ["purple", "pieces of a loop"], ["green", "copies from another device"]];
const HEIGHT = 1000; // of the chart in its own units
const LINE = 400; // more steps than this are too close for a line of live bytes

const arena = { device: "", chart: null, owners: 8 };

function showArena() {
  const { plan } = state;
  const used = plan.devices.filter((device) => device.nbytes);
  if (!used.length) return fill("arena", make("p", {}, "No step needs memory of an arena."));
  if (!used.some((device) => device.device === arena.device)) {
    arena.device = used.reduce((a, b) => (b.peak_live > a.peak_live ? b : a)).device;
  }
  const devices = used.length < 2 ? null : make("label", {}, "Device ",
    make("select", { id: "arena-device", on: { change: (event) => { arena.device = event.target.value; toPeak(); } } },
      used.map((d) => make("option", { value: d.device, selected: d.device === arena.device }, d.place))));
  const parts = [...new Set(plan.steps.node.map((_, s) => plan.where(s)))];
  const range = make("select", { id: "arena-range", on: { change: (event) => zoom(event.target.value) } },
    make("option", { value: "" }, "all"), parts.map((text) => make("option", { value: text, selected: state.zoom === text }, text)));
  const info = plan.devices.find((d) => d.device === arena.device);
  const waste = info.nbytes - info.peak_live;
  fill("arena",
    make("p", {}, `The arena of ${info.place} is ${bytes(info.nbytes)}. Up: bytes of the arena; across: the ${plural(plan.count, "step")} in the order in which they are issued. `,
      waste > 0.001 * info.nbytes ? `Gaps take ${bytes(waste)} at the peak (${percent(waste, info.nbytes)}).` : "There are no gaps at the peak."),
    make("div", { class: "tools" }, devices, make("label", {}, "Steps ", range),
      make("button", { type: "button", id: "arena-peak", on: { click: toPeak } }, "Go to the peak")),
    make("div", { id: "arena-chart" }),
    make("label", { class: "hidden", for: "arena-step" }, "Step"),
    make("input", { type: "range", id: "arena-step", on: { input: (event) => setStep(Number(event.target.value)) } }),
    make("p", { id: "arena-readout", class: "readout", "aria-live": "polite" }),
    kindLegend(plan.blocks[arena.device]),
    make("div", { id: "arena-owners" }));
  drawArena();
}

function kindLegend(blocks) {
  const kinds = KINDS.filter((_, k) => blocks.kind.includes(k));
  return legend([...kinds, ["line", "live bytes"], ["mark", "peak"]]);
}

function toPeak() {
  const info = state.plan.devices.find((d) => d.device === arena.device);
  state.zoom = "";
  [state.from, state.to] = [0, state.plan.count];
  state.step = info.peak_step;
  showArena();
  setStep(info.peak_step);
}

/** Show the steps from the first to the last of a layer. */
function zoom(where) {
  const { plan } = state;
  const inside = plan.steps.node.map((_, s) => s).filter((s) => !where || plan.where(s) === where);
  state.zoom = where;
  [state.from, state.to] = [inside[0], inside.at(-1) + 1];
  drawArena();
  setStep(inside.includes(state.step) ? state.step : inside[0]);
}

function rectangle(x, y, width, height) {
  return `M${x} ${y}h${width}v${height}h${-width}z`;
}

function drawArena() {
  const { plan, from, to } = state;
  const info = plan.devices.find((d) => d.device === arena.device);
  const blocks = plan.blocks[arena.device];
  const y = (n) => +(HEIGHT * (1 - n / info.nbytes)).toFixed(2);
  const paths = KINDS.map(() => []);
  for (let b = 0; b < blocks.start.length; b += 1) {
    const first = Math.max(blocks.start[b], from);
    const last = Math.min(blocks.end[b] + 1, to);
    if (first >= last) continue;
    const top = y(blocks.offset[b] + blocks.nbytes[b]);
    paths[blocks.kind[b]].push(rectangle(first - from, top, last - first, +(y(blocks.offset[b]) - top).toFixed(2)));
  }
  const live = plan.live(arena.device).slice(from, to);
  const line = "M" + live.map((n, i) => `${i} ${y(n)}H${i + 1}`).join("L");
  const parted = to - from <= 160 ? "parted " : "";
  const inside = from <= info.peak_step && info.peak_step < to;
  arena.chart = make("svg", { viewBox: `0 0 ${to - from} ${HEIGHT}`, preserveAspectRatio: "none", height: "260", "aria-hidden": "true",
    on: { click: (event) => setStep(stepAt(event)), mousemove: (event) => hover(event), mouseleave: () => readout() } },
  paths.map((rects, k) => rects.length ? make("path", { class: parted + KINDS[k][0], d: rects.join("") }) : null),
  to - from <= LINE ? make("path", { class: "live", d: line }) : null,
  inside ? make("path", { class: "peak", d: `M${info.peak_step + 0.5 - from} 0V${HEIGHT}` }) : null,
  make("path", { class: "cursor", d: "" }));
  byId("arena-chart").replaceChildren(make("div", { class: "chart", "aria-hidden": "true" },
    make("div", { class: "ticks" }, make("span", { style: { top: 0 } }, bytes(info.nbytes)),
      make("span", { style: { top: "50%" } }, bytes(info.nbytes / 2)), make("span", { style: { top: "100%" } }, "0")),
    arena.chart, ticks()));
  const slider = byId("arena-step");
  Object.assign(slider, { min: from, max: to - 1, value: state.step });
}

/** The names of layers below a chart over steps, as many as there is room for. */
function ticks() {
  const { plan, from, to } = state;
  const all = plan.ticks(from, to);
  const room = Math.max(1, Math.floor(byId("arena").clientWidth / 90));
  const every = Math.ceil(all.length / room);
  let free = 0; // the next place that no text covers
  return make("div", { class: "below" }, all.filter((_, i) => i % every === 0).map(([step, text]) => {
    const left = 100 * (step - from) / (to - from);
    if (left < free) return null;
    free = left + 100 * (text.length * 7 + 10) / byId("arena").clientWidth;
    return free > 101 ? null : make("span", { style: { left: `${left}%` } }, text);
  }));
}

function stepAt(event) {
  const box = event.currentTarget.getBoundingClientRect();
  const share = (event.clientX - box.left) / box.width;
  return Math.min(state.to - 1, Math.max(state.from, state.from + Math.floor(share * (state.to - state.from))));
}

/** Say what is under the pointer. */
function hover(event) {
  const { plan } = state;
  const info = plan.devices.find((d) => d.device === arena.device);
  const step = stepAt(event);
  const box = event.currentTarget.getBoundingClientRect();
  const at = info.nbytes * (1 - (event.clientY - box.top) / box.height);
  const blocks = plan.blocks[arena.device];
  const block = plan.alive(arena.device, step).find((b) => blocks.offset[b] <= at && at < blocks.offset[b] + blocks.nbytes[b]);
  const what = block === undefined ? "free" : `${plan.holder(arena.device, block, step).name}, ${bytes(blocks.nbytes[block])}, ${span(blocks, block)}`;
  byId("arena-readout").replaceChildren(`Step ${step}, ${plan.title(step)}, ${plan.where(step)}: ${what}`);
}

const span = (blocks, b) => (blocks.start[b] === blocks.end[b] ? `step ${blocks.start[b]}` : `steps ${blocks.start[b]} to ${Math.min(blocks.end[b], state.plan.count - 1)}`);

function readout() {
  const { plan, step } = state;
  const live = plan.live(arena.device)[step];
  byId("arena-readout").replaceChildren(
    make("strong", {}, `Step ${step}`), ` of ${plan.count}: `, make("span", { class: "mono" }, plan.title(step)),
    ` on ${plan.places[plan.home[step]]}, ${plan.where(step)}. ${bytes(live)} alive. `,
    make("button", { type: "button", class: "link", on: { click: () => openStep(step) } }, "Show it in the graph"));
}

/** Mark the current step and list what is alive in it. */
function markArena() {
  const { plan, step, from } = state;
  if (!arena.chart) return;
  const slider = byId("arena-step");
  slider.value = step;
  slider.setAttribute("aria-valuetext", `step ${step}, ${plan.title(step)}, ${plan.where(step)}`);
  arena.chart.lastElementChild.setAttribute("d", `M${step + 0.5 - from} 0V${HEIGHT}`);
  readout();
  showOwners();
}

function showOwners() {
  const { plan, step } = state;
  const blocks = plan.blocks[arena.device];
  const all = plan.alive(arena.device, step);
  const live = sum(all.map((b) => blocks.nbytes[b]));
  const rows = all.slice(0, arena.owners).map((b) => {
    const holder = plan.holder(arena.device, b, step);
    const from = make("button", { type: "button", class: "link mono", on: { click: () => openStep(holder.step) } }, holder.name);
    return { cells: [
      make("span", {}, make("i", { class: `key ${KINDS[blocks.kind[b]][0]}`, title: KINDS[blocks.kind[b]][1] }), from),
      size(blocks.nbytes[b]), percent(blocks.nbytes[b], live), span(blocks, b).replace(/steps? /, ""),
      holder.node === undefined ? "" : plan.spec(holder.node),
      holder.node === undefined ? "" : make("code", {}, plan.line(holder.node))] };
  });
  const more = all.length - rows.length;
  byId("arena-owners").replaceChildren(
    table(`Alive on ${plan.devices.find((d) => d.device === arena.device).place} at step ${step}: ${bytes(live)} in ${plural(all.length, "block")}.`,
      ["tensor", ["bytes", "num"], ["share", "num"], ["in use, steps", "num"], "type and ne", "built at"], rows),
    more > 0 ? make("button", { type: "button", on: { click: () => { arena.owners = Infinity; showOwners(); } } }, `Show ${more} more`) : "");
}
