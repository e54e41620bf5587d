// One state, one sampled token: where does the probability come from that praise gives, and where does blame send it?

/**
 * Gradient ascent on sign * log p (form "logprob") or sign * p ("probability") of the sampled token, one step in the
 * logits: z_k += rate * sign * (1[k = sampled] - p_k), times p_sampled in the second form.
 */
export function pushed(logits, sampled, sign, rate, form) {
  const p = softmax(logits);
  const scale = rate * sign * (form === "probability" ? p[sampled] : 1);
  return logits.map((z, k) => z + scale * ((k === sampled ? 1 : 0) - p[k]));
}

/** How much the odds of token a against b have grown: 1 where the prior of the two is preserved. */
export function oddsChange(before, after, a, b) {
  return after[a] / after[b] / (before[a] / before[b]);
}

function render({ model, el }) {
  const labels = model.get("labels");
  const start = model.get("logits");
  const [first, second] = model.get("pair");
  const rate = model.get("rate");
  let logits = [...start];
  let pushes = 0;
  const chart = barChart(
    "Probability of each next token",
    labels.map((label) => ({ label })),
  );
  const output = liveOutput();
  const pick = element("select", {}, ...labels.map((label, i) => element("option", { value: i, textContent: label })));
  pick.value = String(model.get("sampled"));
  const forms = element(
    "select",
    {},
    element("option", { value: "logprob", textContent: "log-probability (code)" }),
    element("option", { value: "probability", textContent: "probability (paper)" }),
  );

  const draw = (what) => {
    const p = softmax(logits);
    chart.draw(p);
    output.textContent =
      `${what} Pushes ${pushes}; entropy ${entropy(p).toFixed(3)} nats, at the start ${entropy(softmax(start)).toFixed(3)}; ` +
      `odds of ${labels[first]} to ${labels[second]} ${oddsChange(softmax(start), p, first, second).toFixed(2)} times the first.`;
  };
  const push = (sign, word) => {
    logits = pushed(logits, Number(pick.value), sign, rate, forms.value);
    pushes += 1;
    draw(`${word} ${labels[Number(pick.value)]}.`);
  };
  const button = (text, act) => {
    const node = element("button", { type: "button", className: "rlw-button", textContent: text });
    node.addEventListener("click", act);
    return node;
  };
  const reset = () => {
    logits = [...start];
    pushes = 0;
    draw("Start.");
  };

  el.classList.add("rlw");
  el.append(
    chart.root,
    element(
      "div",
      { className: "rlw-row" },
      button("Blame it", () => push(-1, "Blamed")),
      button("Praise it", () => push(1, "Praised")),
      button("Start again", reset),
    ),
    element("div", { className: "rlw-row" }, element("label", {}, "sampled token ", pick), element("label", {}, "gradient of the ", forms)),
    output,
  );
  draw("Start.");
}

export default { render };
