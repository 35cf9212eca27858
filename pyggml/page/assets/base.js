// The page's data, how it is written, and how elements are made.

const data = JSON.parse(document.getElementById("data").textContent);
const LAYER = "\ue000"; // stands for the layer's number in a text

const byId = (id) => document.getElementById(id);

/** An element. attrs: attributes; `on` has listeners, `style` CSS properties. Children are text or nodes. */
function make(tag, attrs = {}, ...children) {
  const svg = ["svg", "path", "line", "circle"].includes(tag);
  const element = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [key, value] of Object.entries(attrs)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "on") for (const [event, call] of Object.entries(value)) element.addEventListener(event, call);
    else if (key === "style") for (const [name, text] of Object.entries(value)) element.style.setProperty(name, text);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

const number = new Intl.NumberFormat("en");
const sum = (values) => values.reduce((a, b) => a + b, 0);
const plural = (n, one, many = one + "s") => `${number.format(n)} ${n === 1 ? one : many}`;

/** A number with three significant digits and a unit. */
function scaled(value, units, step) {
  let unit = 0;
  while (unit + 1 < units.length && Math.abs(value) >= step) {
    value /= step;
    unit += 1;
  }
  const digits = unit === 0 ? 0 : Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : 2;
  return `${value.toFixed(digits)} ${units[unit]}`;
}
const bytes = (n) => scaled(n, ["B", "KiB", "MiB", "GiB", "TiB"], 1024);
const flops = (n) => scaled(n, ["flop", "kflop", "Mflop", "Gflop", "Tflop", "Pflop"], 1000);
const time = (s) => (s === 0 ? "0" : s >= 1 ? `${s.toFixed(2)} s` : s >= 1e-3 ? `${(s * 1e3).toFixed(2)} ms` : `${(s * 1e6).toFixed(1)} µs`);
const percent = (part, all) => (all ? `${(100 * part / all).toFixed(part / all < 0.1 ? 1 : 0)} %` : "0 %");
/** MiB as `print(plan.memory)` has them. */
const mib = (n) => (n / 2 ** 20).toFixed(Math.abs(n) >= 2 ** 20 || n === 0 ? 2 : 4);

/** A span of bytes; the exact number is its tooltip. */
const size = (n) => make("span", { title: `${number.format(n)} bytes` }, bytes(n));

/** `3–7, 9` of sorted whole numbers; evenly spaced ones are `0, 2, … 22`. */
function ranges(numbers) {
  const step = numbers.length > 1 ? numbers[1] - numbers[0] : 1;
  const even = numbers.every((n, i) => i === 0 || n - numbers[i - 1] === step);
  if (even && step > 1 && numbers.length > 3) return `${numbers[0]}, ${numbers[1]}, … ${numbers.at(-1)}`;
  const parts = [];
  for (let i = 0; i < numbers.length; i += 1) {
    const first = numbers[i];
    while (numbers[i + 1] === numbers[i] + 1) i += 1;
    parts.push(first === numbers[i] ? `${first}` : `${first}–${numbers[i]}`);
  }
  return parts.join(", ");
}

/**
 * A table. On a narrow screen, its rows are cards: each cell shows the head of its column.
 * heads: texts, or [text, "num"]. rows: {cells, now}, the first cell is the row's head.
 */
function table(caption, heads, rows) {
  const kinds = heads.map((head) => (Array.isArray(head) ? head[1] : ""));
  const texts = heads.map((head) => (Array.isArray(head) ? head[0] : head));
  const cell = (content, i) => {
    const empty = content === "" || content === null || content === undefined;
    const attrs = { class: [kinds[i], empty ? "empty" : ""].join(" ").trim() || null, "data-label": texts[i] };
    return i === 0
      ? make("th", { scope: "row", role: "rowheader" }, content)
      : make("td", { ...attrs, role: "cell" }, empty ? "" : content);
  };
  return make("table", { class: "cards", role: "table" },
    make("caption", {}, caption),
    make("thead", { role: "rowgroup" }, make("tr", { role: "row" },
      texts.map((text, i) => make("th", { scope: "col", role: "columnheader", class: kinds[i] || null }, text)))),
    make("tbody", { role: "rowgroup" },
      rows.map((row) => make("tr", { role: "row", class: row.now ? "now" : null }, row.cells.map(cell)))));
}

/** Replace all of a section but its heading. */
function fill(id, ...children) {
  const section = byId(id);
  section.replaceChildren(section.firstElementChild, ...children.flat(Infinity).filter(Boolean));
}

function legend(entries) {
  return make("ul", { class: "legend" },
    entries.map(([kind, text]) => make("li", {}, make("i", { class: kind }), text)));
}
