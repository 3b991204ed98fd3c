// Charts of the last minutes, one value a second: a line with its area, or two stacked values.

import { compact, sum } from "./dom.js";

const SPACE = "http://www.w3.org/2000/svg";
const LEFT = 38;
const BOTTOM = 18;
const TOP = 8;
const SECONDS = 240;

function shape(name, attributes, text) {
  const element = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** The next of 1, 2, 5, 10, … that is not below `value`. */
function roundUp(value) {
  const scale = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return [1, 2, 5, 10].map((step) => step * scale).find((step) => step >= value);
}

const round = (number) => Math.round(number * 10) / 10;

export class Chart {
  /** `names` are those of one or two columns; two are stacked. */
  constructor(svg, names) {
    this.svg = svg;
    this.names = names;
    this.columns = names.map(() => []);
    this.at = null;
    svg.addEventListener("pointermove", (event) => this.point(event.offsetX));
    svg.addEventListener("pointerleave", () => this.point(null));
    new ResizeObserver(() => this.draw()).observe(svg);
  }

  /** Columns of numbers, the newest last. */
  show(columns) {
    this.columns = columns.map((column) => [...Array(Math.max(0, SECONDS - column.length)).fill(0), ...column.slice(-SECONDS)]);
    const all = this.columns[0].map((_, index) => sum(this.columns.map((column) => column[index])));
    this.max = roundUp(Math.max(...all, 1));
    this.svg.setAttribute("aria-label", `${this.names.join(" and ")} per second: now ${all.at(-1)}, at most ${Math.max(...all)}`);
    this.draw();
  }

  point(x) {
    this.at = x;
    this.draw();
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.svg;
    if (width === 0 || this.columns[0].length === 0) return;
    const [right, bottom] = [width - 2, height - BOTTOM];
    const x = (index) => round(LEFT + ((right - LEFT) * index) / (SECONDS - 1));
    const y = (value) => round(bottom - ((bottom - TOP) * value) / this.max);
    const parts = [];
    for (const value of [0, this.max / 2, this.max]) {
      parts.push(shape("line", { class: "grid", x1: LEFT, x2: right, y1: y(value), y2: y(value) }));
      if (Number.isInteger(value)) {
        parts.push(shape("text", { class: "label", x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, compact(value)));
      }
    }
    for (const [ago, anchor] of [[240, "start"], [120, "middle"], [0, "end"]]) {
      const text = ago === 0 ? "now" : `${ago / 60} min ago`;
      parts.push(shape("text", { class: "label", x: x(Math.max(0, SECONDS - 1 - ago)), y: height - 3, "text-anchor": anchor }, text));
    }
    if (this.columns.length === 1) parts.push(...this.line(x, y));
    else parts.push(...this.stacks(x, y, right));
    if (this.at !== null) parts.push(...this.tip(x, right, bottom));
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.replaceChildren(...parts);
  }

  line(x, y) {
    const points = this.columns[0].map((value, index) => `${x(index)},${y(value)}`);
    const area = `${x(0)},${y(0)} ${points.join(" ")} ${x(SECONDS - 1)},${y(0)}`;
    return [shape("polygon", { class: "area-a", points: area }), shape("polyline", { class: "line-a", points: points.join(" ") })];
  }

  stacks(x, y, right) {
    const width = Math.max(1.5, round((right - LEFT) / SECONDS));
    return this.columns[0].flatMap((first, index) => {
      const second = this.columns[1][index];
      const bar = (kind, from, to) =>
        shape("rect", { class: `fill-${kind}`, x: round(x(index) - width / 2), width, y: y(to), height: round(y(from) - y(to)) });
      return [...(first ? [bar("a", 0, first)] : []), ...(second ? [bar("b", first, first + second)] : [])];
    });
  }

  tip(x, right, bottom) {
    const index = Math.round(((this.at - LEFT) / (right - LEFT)) * (SECONDS - 1));
    if (index < 0 || index >= SECONDS) return [];
    const values = this.columns.map((column, turn) => `${compact(column[index])} ${this.names[turn]}`);
    const half = index < SECONDS / 2;
    const place = { class: "tip", x: x(index) + (half ? 6 : -6), y: TOP + 10, "text-anchor": half ? "start" : "end" };
    return [
      shape("line", { class: "cross", x1: x(index), x2: x(index), y1: TOP, y2: bottom }),
      shape("text", place, `${values.join(", ")} · ${SECONDS - index} s ago`),
    ];
  }
}
