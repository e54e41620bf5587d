// One prompt, a few answers, a softmax policy over them. A step is the exact expectation over groups of infinite size,
// so nothing here is sampled: what you see is the drift of the method and no noise.

export function expectedReward(probabilities, rewards) {
  return probabilities.reduce((sum, p, i) => sum + p * rewards[i], 0);
}

/** Group-normalised advantages in the limit of a large group; all zero when every answer earns the same (dead group). */
export function advantages(probabilities, rewards) {
  const mean = expectedReward(probabilities, rewards);
  const variance = probabilities.reduce((sum, p, i) => sum + p * (rewards[i] - mean) ** 2, 0);
  const deviation = Math.sqrt(variance);
  return rewards.map((reward) => (deviation < 1e-12 ? 0 : (reward - mean) / deviation));
}

/** One ascent step on J. The policy gradient in logit i is p_i A_i, because the advantages have mean zero under p. */
export function grpoStep(logits, rewards, learningRate) {
  const probabilities = softmax(logits);
  const advantage = advantages(probabilities, rewards);
  return logits.map((logit, i) => logit + learningRate * probabilities[i] * advantage[i]);
}

/** Share of the second correct answer among all correct answers; null with fewer than two of them. */
export function secondCorrectShare(probabilities, rewards) {
  const correct = probabilities.filter((_, i) => rewards[i] > 0);
  return correct.length < 2 ? null : correct[1] / correct.reduce((sum, p) => sum + p, 0);
}

const MANY = 25;

function render({ model, el }) {
  const rewards = model.get("rewards");
  const start = model.get("logits");
  let logits = start;
  let steps = 0;

  const rows = model.get("labels").map((label, i) => ({
    label: `${label} (reward ${rewards[i]})`,
    hatched: rewards[i] <= 0,
  }));
  const chart = barChart("Probability of each answer", rows);
  const output = liveOutput();
  const rate = slider(
    "learning rate",
    { min: 0.1, max: 2, step: 0.1, value: model.get("learning_rate") },
    (value) => value.toFixed(1),
  );
  const button = (text) => element("button", { type: "button", className: "rlw-button", textContent: text });
  const once = button("GRPO step");
  const often = button(`${MANY} GRPO steps`);
  const reset = button("Reset");

  const draw = () => {
    const p = softmax(logits);
    const share = secondCorrectShare(p, rewards);
    chart.draw(p);
    output.textContent =
      `After ${steps} steps at learning rate ${Number(rate.input.value).toFixed(1)}: ` +
      `expected reward ${expectedReward(p, rewards).toFixed(3)}, entropy ${entropy(p).toFixed(3)} nats` +
      (share === null ? "." : `, second correct answer's share of the correct ones ${share.toFixed(3)}.`);
  };
  const advance = (count) => {
    for (let i = 0; i < count; i += 1) logits = grpoStep(logits, rewards, Number(rate.input.value));
    steps += count;
    draw();
  };
  once.addEventListener("click", () => advance(1));
  often.addEventListener("click", () => advance(MANY));
  reset.addEventListener("click", () => {
    logits = start;
    steps = 0;
    draw();
  });
  rate.input.addEventListener("input", draw);

  el.classList.add("rlw");
  el.append(chart.root, rate.root, element("div", { className: "rlw-row" }, once, often, reset), output);
  draw();
}

export default { render };
