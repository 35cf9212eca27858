// The page: what is chosen now, and the parts that show it.

const plans = data.plans.map((raw) => new Plan(raw));
const state = { plan: plans[0], step: 0, from: 0, to: 0, zoom: "" };

/** Make `step` the current one, in every chart and list. */
function setStep(step) {
  state.step = step;
  if (step < state.from || step >= state.to) {
    [state.from, state.to, state.zoom] = [0, state.plan.count, ""];
    showArena();
  }
  markArena();
  markDevices();
  markCost();
  markGraph();
}

function showPlan(plan) {
  Object.assign(state, { plan, from: 0, to: plan.count, zoom: "" });
  arena.chart = null;
  cost.draw = null;
  const largest = plan.devices.reduce((a, b) => (b.peak_live > a.peak_live ? b : a));
  state.step = largest.peak_step;
  showArena();
  showDevices();
  showCost();
  showGraph();
  if (plan.count) setStep(state.step);
}

function showHead() {
  byId("title").textContent = data.title;
  byId("about").textContent = data.about.join(" · ");
  byId("footer").append(`pyggml ${data.version}`, ...(data.command ? [": ", make("code", {}, data.command)] : []));
  const names = { memory: "Memory", variants: "Other options", arena: "Arena", devices: "Devices", cost: "Cost", graph: "Graph" };
  for (const [id, text] of Object.entries(names)) {
    if (id === "variants" && data.variants.length < 2) continue;
    byId("sections-nav").append(make("li", {}, make("a", { href: `#${id}` }, text)));
  }
  byId("plans").hidden = plans.length < 2;
  byId("plans").append(...plans.map((plan, i) => make("label", {},
    make("input", { type: "radio", name: "plan", value: i, checked: i === 0, on: { change: () => showPlan(plan) } }), plan.caption)));
}

showHead();
showMemory();
showVariants();
showPlan(plans[0]);
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  drawArena();
  markArena();
});
