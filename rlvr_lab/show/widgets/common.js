// Shared by all widgets: the arithmetic of a softmax policy, and a few accessible page elements.
// No import of any kind: anywidget loads this text from a blob address, and the book makes no outside request.

export function softmax(logits, temperature = 1) {
  const scaled = logits.map((logit) => logit / temperature);
  const top = Math.max(...scaled); // subtracting the maximum keeps exp() from overflowing
  const weights = scaled.map((value) => Math.exp(value - top));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => weight / total);
}

/** Shannon entropy in nats; 0 log 0 counts as 0. */
export function entropy(probabilities) {
  return -probabilities.reduce((sum, p) => sum + (p > 0 ? p * Math.log(p) : 0), 0) + 0; // "+ 0" turns -0 into 0
}

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

/** A native range input: it brings its own keyboard operation and its own role. */
function slider(labelText, { min, max, step, value }, format) {
  const readout = element("span", { className: "rlw-readout" });
  const input = element("input", { type: "range", min, max, step, value });
  const root = element("label", { className: "rlw-slider" }, element("span", { textContent: labelText }), input, readout);
  const update = () => {
    readout.textContent = format(Number(input.value));
    input.setAttribute("aria-valuetext", readout.textContent);
  };
  input.addEventListener("input", update);
  update();
  return { root, input, update };
}

/** Rows "label, bar, number". The number is text, so the bar itself is hidden from screen readers. */
function barChart(title, rows) {
  const list = element("ul", { className: "rlw-bars" });
  const fills = [];
  const numbers = [];
  for (const { label, hatched = false } of rows) {
    const fill = element("span", { className: hatched ? "rlw-fill rlw-hatched" : "rlw-fill" });
    const track = element("span", { className: "rlw-track" }, fill);
    track.setAttribute("aria-hidden", "true");
    const number = element("span", { className: "rlw-number" });
    fills.push(fill);
    numbers.push(number);
    list.append(element("li", {}, element("span", { className: "rlw-label", textContent: label }), track, number));
  }
  const root = element("section", { className: "rlw-chart" }, element("p", { className: "rlw-title", textContent: title }), list);
  root.setAttribute("aria-label", title);
  const draw = (shares) =>
    shares.forEach((share, i) => {
      fills[i].style.inlineSize = `${(100 * share).toFixed(2)}%`;
      numbers[i].textContent = share.toFixed(3);
    });
  return { root, draw };
}

/** The result in words. `<output>` has the role "status": a screen reader announces each change. */
function liveOutput() {
  const output = element("output", { className: "rlw-output" });
  output.setAttribute("aria-live", "polite");
  return output;
}
