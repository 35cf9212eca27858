// The dataflow beside a list of steps: each value is a line from its step to its last reader.

const RAIL = { step: 11, left: 9, y: 15, most: 9 };

/** For each of `steps`: {own, through, starts, ends, reads}, in numbers of lanes; and how many lanes there are. */
function rails(plan, steps) {
  const row = new Map(steps.map((s, i) => [s, i]));
  const values = new Map(); // base node -> {from, to}: rows; from -1 is above, to steps.length below
  steps.forEach((s, i) => {
    for (const base of new Set(plan.steps.reads[s].map((n) => plan.base(n)))) {
      const maker = plan.maker.get(base);
      if (maker === undefined || maker === s) continue; // weights, inputs and states have no line
      const from = row.has(maker) && row.get(maker) < i ? row.get(maker) : -1;
      const value = values.get(base) || { from, to: i, reads: [] };
      value.to = i;
      value.reads.push(i);
      values.set(base, value);
    }
  });
  steps.forEach((s, i) => {
    for (const node of plan.steps.nodes[s]) {
      const later = (plan.users.get(node) || []).some((user) => !row.has(user) && user > s);
      const leaves = later || Object.values(plan.outputs).some((output) => plan.base(output) === node);
      if (!leaves) continue;
      const value = values.get(node) || { from: i, to: i, reads: [] };
      value.to = steps.length;
      values.set(node, value);
    }
  });
  const rows = steps.map(() => ({ own: -1, through: [], starts: [], ends: [], reads: [] }));
  const free = []; // lane -> the row from which it is free
  const sorted = [...values.values()].sort((a, b) => a.from - b.from || b.to - a.to);
  for (const value of sorted) {
    let lane = free.findIndex((end) => end <= value.from);
    if (lane < 0) lane = Math.min(free.length, RAIL.most - 1);
    free[lane] = Math.max(free[lane] ?? -1, value.to);
    for (let i = Math.max(value.from, 0); i <= Math.min(value.to, steps.length - 1); i += 1) {
      if (i === value.from) {
        rows[i].starts.push(lane);
        if (rows[i].own < 0) rows[i].own = lane;
      } else if (i === value.to) rows[i].ends.push(lane);
      else rows[i].through.push(lane);
    }
    for (const i of value.reads) rows[i].reads.push(lane);
  }
  rows.forEach((one) => {
    if (one.own >= 0) return;
    const taken = new Set([...one.through, ...one.ends]);
    one.own = one.ends.length ? Math.min(...one.ends) : 0;
    while (!one.ends.length && taken.has(one.own)) one.own += 1;
  });
  const lanes = Math.max(1, ...rows.map((one) => 1 + Math.max(one.own, ...one.through, ...one.ends, ...one.starts)));
  return { rows, lanes };
}

const railWidth = (lanes) => 2 * RAIL.left + RAIL.step * (lanes - 1);

function drawRail(row) {
  const x = (lane) => RAIL.left + RAIL.step * lane;
  const line = (lane, y1, y2) => make("line", { x1: x(lane), x2: x(lane), y1, y2 });
  const across = [...row.reads, ...row.starts].filter((lane) => lane !== row.own);
  return make("svg", { "aria-hidden": "true" },
    row.through.map((lane) => line(lane, 0, "100%")),
    row.ends.map((lane) => line(lane, 0, RAIL.y)),
    row.starts.map((lane) => line(lane, RAIL.y, "100%")),
    across.map((lane) => make("line", { x1: x(lane), x2: x(row.own), y1: RAIL.y, y2: RAIL.y })),
    make("circle", { cx: x(row.own), cy: RAIL.y, r: 4 }));
}
