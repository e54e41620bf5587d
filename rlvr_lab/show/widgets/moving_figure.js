// A figure computed at several positions of one dial: what changes with it, and what stays?

/** The smallest range that holds the values of every position, with a margin, so that axes stand still. */
export function range(values, zero) {
  const finite = values.filter((value) => Number.isFinite(value));
  let [low, high] = [Math.min(...finite), Math.max(...finite)];
  if (zero) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
  const margin = 0.04 * (high - low) || 0.5;
  return [low - (zero && low === 0 ? 0 : margin), high + (zero && high === 0 ? 0 : margin)];
}

/** Round values inside a range, about four of them, in steps of 1, 2 or 5 times a power of ten. */
export function ticks([low, high], about = 4) {
  const rough = (high - low) / about;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i += 1) found.push(Number((i * step).toPrecision(6)));
  return found;
}

/** An SVG path through points; null values interrupt it. */
export function path(xs, ys, across, up) {
  let pen = "M";
  const parts = [];
  xs.forEach((x, i) => {
    if (ys[i] === null) {
      pen = "M";
      return;
    }
    parts.push(`${pen}${across(x).toFixed(1)},${up(ys[i]).toFixed(1)}`);
    pen = "L";
  });
  return parts.join(" ");
}

const [WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT] = [520, 270, 58, 42, 10, 12];
const LOOKS = [
  { stroke: "var(--rl-blue, #0961EB)", dash: "", shape: "circle" },
  { stroke: "var(--rl-amber, #B57B16)", dash: "8 4", shape: "square" },
  { stroke: "var(--rl-green, #1F6848)", dash: "8 3 2 3", shape: "diamond" },
  { stroke: "var(--rl-magenta, #B00277)", dash: "14 4", shape: "triangle" },
];

const draw_tag = (tag, attributes, ...children) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};

const text = (content, x, y, attributes = {}) =>
  draw_tag("text", { x, y, fill: "currentColor", "font-size": 12, "text-anchor": "middle", ...attributes }, content);

function mark(shape, x, y, colour) {
  const outline = {
    square: `M${x - 3},${y - 3}h6v6h-6z`,
    diamond: `M${x},${y - 4.5}l4.5,4.5l-4.5,4.5l-4.5,-4.5z`,
    triangle: `M${x},${y - 4.5}l4.5,8h-9z`,
    circle: `M${x - 3.4},${y}a3.4,3.4 0 1,0 6.8,0a3.4,3.4 0 1,0 -6.8,0z`,
  }[shape];
  return draw_tag("path", { d: outline, fill: colour });
}

function axes(box, across, up, xs, ys, names) {
  const grid = { stroke: "currentColor", "stroke-opacity": 0.18 };
  for (const y of ys) {
    box.append(draw_tag("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: up(y), y2: up(y), ...grid }));
    box.append(text(String(y), LEFT - 6, up(y) + 4, { "text-anchor": "end" }));
  }
  for (const [x, label] of xs) {
    box.append(draw_tag("line", { x1: across(x), x2: across(x), y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM + 4, stroke: "currentColor" }));
    box.append(text(label, across(x), HEIGHT - BOTTOM + 17));
  }
  box.append(draw_tag("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM, stroke: "currentColor" }));
  box.append(text(names.x, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6));
  const middle = (TOP + HEIGHT - BOTTOM) / 2;
  box.append(text(names.y, 12, middle, { transform: `rotate(-90 12 ${middle})` }));
}

function legend(curves, bars) {
  const list = element("ul", { className: "rlw-legend" });
  curves.forEach((curve, i) => {
    const look = LOOKS[i];
    const key = draw_tag("svg", { width: 30, height: 12, "aria-hidden": "true" });
    if (bars) key.append(draw_tag("rect", { x: 8, y: 1, width: 14, height: 10, fill: look.stroke }));
    else if (curve.points) key.append(mark(look.shape, 15, 6, look.stroke));
    else key.append(draw_tag("path", { d: "M0,6L30,6", stroke: look.stroke, "stroke-width": 2.5, "stroke-dasharray": look.dash }));
    list.append(element("li", {}, key, element("span", { textContent: curve.name })));
  });
  return list;
}

function plot(box, curves, across, up, bars) {
  const slot = curves[0].x.length > 1 ? Math.abs(across(curves[0].x[1]) - across(curves[0].x[0])) : 60;
  const width = Math.min(0.8 * slot, 60) / curves.length;
  curves.forEach((curve, i) => {
    const look = LOOKS[i];
    if (bars) {
      curve.x.forEach((x, k) => {
        if (curve.y[k] === null) return;
        const [base, tip] = [up(0), up(curve.y[k])];
        const left = across(x) + (i - curves.length / 2) * width;
        box.append(draw_tag("rect", { x: left, y: Math.min(base, tip), width: 0.92 * width, height: Math.abs(base - tip), fill: look.stroke }));
      });
    } else if (curve.points) {
      curve.x.forEach((x, k) => curve.y[k] !== null && box.append(mark(look.shape, across(x), up(curve.y[k]), look.stroke)));
    } else {
      const line = { fill: "none", stroke: look.stroke, "stroke-width": 2.5, "stroke-dasharray": look.dash };
      box.append(draw_tag("path", { d: path(curve.x, curve.y, across, up), ...line }));
    }
  });
}

function render({ model, el }) {
  const [frames, bars, labels] = [model.get("frames"), model.get("bars"), model.get("labels")];
  const all = frames.flatMap((frame) => frame.curves);
  const [xs, ys] = [range(all.flatMap((c) => c.x), false), range(all.flatMap((c) => c.y.filter((v) => v !== null)), bars)];
  if (bars) [xs[0], xs[1]] = [Math.min(...all[0].x) - 0.6, Math.max(...all[0].x) + 0.6];
  const across = (x) => LEFT + ((x - xs[0]) / (xs[1] - xs[0])) * (WIDTH - LEFT - RIGHT);
  const up = (y) => HEIGHT - BOTTOM - ((y - ys[0]) / (ys[1] - ys[0])) * (HEIGHT - BOTTOM - TOP);
  const marks = labels.length ? labels.map((label, i) => [i, label]) : ticks(xs).map((x) => [x, String(x)]);

  const dial = slider(
    model.get("dial"),
    { min: 0, max: frames.length - 1, step: 1, value: model.get("start") },
    (v) => frames[v].label,
  );
  const picture = element("div", { className: "rlw-picture" });
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", model.get("alt"));
  const output = liveOutput();
  const keys = element("div");
  const draw = () => {
    const frame = frames[Number(dial.input.value)];
    const box = draw_tag("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, width: "100%", "aria-hidden": "true" });
    axes(box, across, up, marks, ticks(ys), { x: model.get("x"), y: model.get("y") });
    plot(box, frame.curves, across, up, bars);
    picture.replaceChildren(box);
    keys.replaceChildren(legend(frame.curves, bars));
    output.textContent = frame.says;
  };
  dial.input.addEventListener("input", draw);
  el.classList.add("rlw");
  el.append(picture, keys, dial.root, output);
  draw();
}

export default { render };
