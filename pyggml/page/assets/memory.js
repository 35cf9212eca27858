// The memory of the page's plans together, and what other options would change.

const PARTS = [
  ["weights", "weights", "blue"], ["states", "caches and states", "green"], ["inputs", "inputs", "purple"],
  ["compute", "compute (the arena)", "orange"], ["workspace", "workspace", "grey"],
];

function showMemory() {
  const memory = data.memory;
  const rows = memory.devices.map((row) => ({
    cells: [
      make("span", { class: "mono" }, row.device + (row.size_text ? ` (assumed ${row.size_text})` : "")),
      ...PARTS.map(([key]) => mib(row[key])), mib(row.total), mib(row.score_peak), mib(row.score_peak_plain),
    ],
  }));
  if (memory.devices.length > 1) {
    const all = (key) => mib(sum(memory.devices.map((row) => row[key])));
    rows.push({ cells: ["all", ...PARTS.map(([key]) => all(key)), all("total"), mib(memory.score_peak), mib(memory.score_peak_plain)] });
  }
  const heads = ["device", "weights", "states", "inputs", "compute", "workspace", "total", "score peak", "plain"];
  const what = data.plans.length > 1 ? "MiB, for all plans of this page together." : "MiB.";
  const amb = memory.amb === null ? "none" : `${mib(memory.amb)} MiB`;
  fill("memory",
    make("p", {}, peakSentence()),
    bars(memory.devices),
    legend(PARTS.filter(([key]) => memory.devices.some((row) => row[key])).map(([, text, kind]) => [kind, text])),
    table(`${what} Exact, and known before anything is allocated. Attention budget: ${amb}.`,
      heads.map((head, i) => (i ? [head, "num"] : head)), rows),
    make("p", { class: "soft" }, "Score peak: most attention scores and expanded K and V alive at once; plain: without a budget."),
    memory.devices.filter((row) => row.staging).map((row) => make("p", { class: "soft" },
      `Copies to and from ${row.device} use another ${mib(row.staging)} MiB of pinned host memory.`)));
}

/** Why the largest arena is as large as it is. */
function peakSentence() {
  let best = null;
  for (const plan of plans) {
    for (const arena of plan.devices) if (!best || arena.peak_live > best.arena.peak_live) best = { plan, arena };
  }
  if (!best || !best.arena.peak_live) return "No step needs memory of an arena.";
  const { plan, arena } = best;
  const step = arena.peak_step;
  const owners = plan.alive(arena.device, step);
  const blocks = plan.blocks[arena.device];
  const most = [];
  let part = 0;
  for (const b of owners) {
    if (most.length === 4 || part > 0.9 * arena.peak_live) break;
    most.push(b);
    part += blocks.nbytes[b];
  }
  const names = most.map((b) => `${plan.holder(arena.device, b, step).name} (${bytes(blocks.nbytes[b])})`);
  const which = plans.length > 1 ? ` in the plan for ${plan.caption}` : "";
  return `Compute memory peaks on ${arena.place}${which}, with ${bytes(arena.peak_live)} alive at step ${step}, ` +
    `${plan.title(step)}, in ${plan.where(step)}. ${percent(part, arena.peak_live)} of it: ${names.join(", ")}.`;
}

function bars(devices) {
  const widest = Math.max(...devices.map((row) => Math.max(row.total, row.size || 0)), 1);
  return make("div", { class: "bars", "aria-hidden": "true" }, devices.map((row) => {
    const all = Math.max(row.total, row.size || 0);
    const over = row.size !== null && row.total > row.size;
    const free = row.size === null ? "" : over ? `, ${bytes(row.total - row.size)} too much` : `, ${bytes(row.size - row.total)} free`;
    return make("div", {},
      make("span", { class: "mono" }, row.device),
      make("span", { class: "bar", style: { width: `${100 * all / widest}%` } },
        PARTS.map(([key, , kind]) => row[key] ? make("span", { class: kind, style: { width: `${100 * row[key] / all}%` } }) : null)),
      make("span", { class: over ? "over amount" : "amount" }, bytes(row.total) + free));
  }));
}

function showVariants() {
  const [now, ...others] = data.variants;
  byId("variants").hidden = !others.length;
  if (!others.length) return;
  const devices = now.memory.devices.map((row) => row.device);
  const of = (memory, device, key) => (memory.devices.find((row) => row.device === device) || {})[key] || 0;
  const total = (memory) => sum(memory.devices.map((row) => row.total));
  const difference = (memory) => {
    const more = total(memory) - total(now.memory);
    return more === 0 ? "the same" : `${more > 0 ? "+" : "−"}${bytes(Math.abs(more))}`;
  };
  const several = devices.length > 1;
  const heads = ["options", "caches", ...devices.map((d) => (several ? `compute, ${d}` : "compute")), "score peak",
    ...devices.map((d) => (several ? `total, ${d}` : "total")), "change"];
  heads.forEach((head, i) => { if (i) heads[i] = [head, "num"]; });
  const rows = data.variants.map((variant, i) => {
    const change = i ? make("code", {}, variant.change) : make("span", {}, "now: ", make("code", {}, variant.change));
    if (!variant.memory) return { cells: [make("span", {}, change, make("br"), make("span", { class: "soft" }, variant.reason)), ...heads.slice(1).map(() => "")] };
    const memory = variant.memory;
    return {
      now: i === 0,
      cells: [change, size(sum(memory.devices.map((row) => row.states))),
        ...devices.map((device) => size(of(memory, device, "compute"))), size(memory.score_peak),
        ...devices.map((device) => size(of(memory, device, "total"))), i ? difference(memory) : ""],
    };
  });
  fill("variants", table("Each row changes one thing and was planned like this page; nothing is estimated.", heads, rows));
}
