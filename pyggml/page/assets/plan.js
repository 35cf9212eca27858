// A plan: names of its nodes and steps, who computes what, and what is alive when.

class Plan {
  constructor(raw) {
    Object.assign(this, raw);
    this.count = this.steps.node.length;
    this.timed = this.steps.seconds !== undefined;
    this.maker = new Map(); // node -> the step that computes it
    this.steps.nodes.forEach((nodes, s) => nodes.forEach((n) => this.maker.has(n) || this.maker.set(n, s)));
    this.steps.node.forEach((n, s) => this.maker.set(n, s));
    this.section = []; // step -> [section, index of the layer in it]
    this.sections.forEach((section, k) => section.steps.forEach((steps, i) => steps.forEach((s) => (this.section[s] = [k, i]))));
    this.users = new Map(); // node -> the steps that read it or a view of it
    this.steps.reads.forEach((reads, s) => {
      for (const base of new Set(reads.map((n) => this.base(n)))) {
        if (!this.users.has(base)) this.users.set(base, []);
        this.users.get(base).push(s);
      }
    });
    this.named = this.steps.kernels.some((kernels, s) => kernels && !this.isCopy(s)); // a backend may not name its kernels
    this.home = this.steps.split.map((k) => this.splits[k][0]); // step -> place
  }

  text(number, layer = -1) {
    const text = data.texts[number];
    return layer < 0 ? text : text.replaceAll(LAYER, layer);
  }

  base(node) {
    const base = this.nodes.base[node];
    return base < 0 ? node : base;
  }

  label(node) {
    return this.text(this.nodes.name[node], this.nodes.layer[node]);
  }

  op(node) {
    return this.text(this.nodes.op[node]);
  }

  /** The label, or that of the source of a view or copy, or the op. */
  name(node) {
    for (;;) {
      const label = this.label(node);
      if (label) return label;
      const passes = this.nodes.base[node] >= 0 || this.op(node) === "transfer";
      if (!passes || !this.nodes.src[node].length) return this.op(node);
      node = this.nodes.src[node][0];
    }
  }

  isCopy(step) {
    return this.op(this.steps.node[step]) === "transfer";
  }

  /** `q-0 = mul_mat`, or `mul_mat` without a label. */
  title(step) {
    const node = this.steps.node[step];
    if (this.isCopy(step)) return `copy of ${this.name(this.nodes.src[node][0])}`;
    return this.label(node) ? `${this.label(node)} = ${this.op(node)}` : this.op(node);
  }

  call(step) {
    const node = this.steps.node[step];
    if (this.isCopy(step)) return `from ${this.places[this.nodes.place[this.nodes.src[node][0]]]}`;
    const ops = this.steps.nodes[step].map((n) => this.op(n)).join(" + ");
    return `${ops}(${this.steps.reads[step].map((n) => this.name(n)).join(", ")})`;
  }

  spec(node) {
    return `${this.text(this.nodes.type[node])} [${this.text(this.nodes.ne[node])}]`;
  }

  kernels(step) {
    const text = this.text(this.steps.kernels[step]);
    return text ? text.split("\n") : [];
  }

  /** Why a step does not take the fast kernel; "" if it does. */
  why(step) {
    return this.text(this.steps.why[step]);
  }

  line(node) {
    return this.text(this.nodes.line[node]);
  }

  where(step) {
    const [k, i] = this.section[step];
    return this.sections[k].layers.length ? `layer ${this.sections[k].layers[i]}` : this.sections[k].name;
  }

  /** Blocks of a device that are alive in a step, largest first. */
  alive(device, step) {
    const blocks = this.blocks[device];
    const inside = [];
    for (let b = 0; b < blocks.start.length; b += 1) {
      if (blocks.start[b] <= step && step <= blocks.end[b]) inside.push(b);
    }
    return inside.sort((a, b) => blocks.nbytes[b] - blocks.nbytes[a]);
  }

  /** What a block holds in a step: the newest tensor in it, or the step's scratch. */
  holder(device, block, step) {
    const blocks = this.blocks[device];
    const tensors = blocks.tensors[block];
    if (!tensors.length) return { name: `scratch of ${this.title(blocks.start[block])}`, step: blocks.start[block] };
    let best = tensors[0];
    for (const tensor of tensors) if (tensor[0] <= step) best = tensor;
    return { name: this.name(best[1]), step: best[0], node: best[1] };
  }

  /** Live bytes of a device in each step. */
  live(device) {
    const blocks = this.blocks[device];
    const change = new Array(this.count + 1).fill(0);
    blocks.nbytes.forEach((n, b) => {
      change[blocks.start[b]] += n;
      change[blocks.end[b] + 1] -= n;
    });
    let now = 0;
    return change.slice(0, this.count).map((delta) => (now += delta));
  }

  /** First steps of layers, for ticks: [step, text]. */
  ticks(from, to) {
    const ticks = [];
    let last = "";
    for (let s = from; s < to; s += 1) {
      const where = this.where(s);
      if (where !== last && !ticks.some((tick) => tick[1] === where)) ticks.push([s, where]);
      last = where;
    }
    return ticks;
  }
}
