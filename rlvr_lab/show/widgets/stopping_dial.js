// Early stopping on recorded chains: what does a threshold on the answer's entropy save, and what does it cost, beside
// the same places dealt at random and beside one number of steps for all that thinks as many tokens?

/** The first k >= least with an entropy below the threshold after step k; null where there is none. */
export function stopPlace(entropy, threshold, least) {
  const found = entropy.findIndex((value, i) => i + 1 >= least && value < threshold);
  return found < 0 ? null : found + 1;
}

/** Index of the response at a place: the last one where the chain was not stopped, or is shorter. */
export function indexOf(chain, place) {
  return place === null ? chain.entropy.length : Math.min(place - 1, chain.entropy.length);
}

function mean(values) {
  return values.reduce((total, value) => total + value, 0) / values.length;
}

/** Mean of a field over chains, each at its own place. */
export function atPlaces(chains, places, name) {
  return mean(chains.map((chain, i) => chain[name][indexOf(chain, places[i])]));
}

/** What dealing the places to the chains at random gives on average. */
export function dealt(chains, places, name) {
  return mean(chains.map((chain) => mean(places.map((place) => chain[name][indexOf(chain, place)]))));
}

/** Means of fields where all stop after b steps, or b + 1 for such a share that as many tokens are thought. */
export function equalBudget(chains, thought, names) {
  const longest = Math.max(...chains.map((chain) => chain.entropy.length));
  const at = (b, name) => atPlaces(chains, chains.map(() => b), name);
  let b = 1;
  while (b <= longest && at(b + 1, "thought") <= thought) b += 1;
  const gap = at(b + 1, "thought") - at(b, "thought");
  const share = gap > 0 ? Math.min(1, Math.max(0, (thought - at(b, "thought")) / gap)) : 0;
  return names.map((name) => at(b, name) + share * (at(b + 1, name) - at(b, name)));
}

function render({ model, el }) {
  const chains = model.get("chains");
  const never = chains.map(() => null);
  const rows = ["never stopped", "stopped by entropy", "same places at random", "equal budget"];
  const chart = barChart("Accuracy", rows.map((label, i) => ({ label, hatched: i > 1 })));
  const output = liveOutput();
  const power = slider("stop below, nats", { min: -4, max: 0.5, step: 0.1, value: model.get("power") }, (v) =>
    (10 ** v).toPrecision(2),
  );
  const least = slider("not before step", { min: 1, max: 6, step: 1, value: model.get("least") }, String);

  const draw = () => {
    const [p, first] = [power, least].map((control) => Number(control.input.value));
    const places = chains.map((chain) => stopPlace(chain.entropy, 10 ** p, first));
    const whole = atPlaces(chains, never, "tokens");
    const [right, used] = equalBudget(chains, atPlaces(chains, places, "thought"), ["correct", "tokens"]);
    const accuracy = [
      atPlaces(chains, never, "correct"),
      atPlaces(chains, places, "correct"),
      dealt(chains, places, "correct"),
      right,
    ];
    const saved = [atPlaces(chains, places, "tokens"), dealt(chains, places, "tokens"), used].map((n) => 1 - n / whole);
    chart.draw(accuracy);
    const percent = (share) => `${(100 * share).toFixed(0)} %`;
    output.textContent =
      `below ${(10 ** p).toPrecision(2)} nats, from step ${first}: ${places.filter((k) => k !== null).length} of ` +
      `${chains.length} chains are stopped. Tokens saved ${percent(saved[0])}, at random ${percent(saved[1])}, equal ` +
      `budget ${percent(saved[2])}. Accuracy ${accuracy.map((a) => a.toFixed(2)).join(", ")} in the order of the bars.`;
  };
  for (const control of [power, least]) control.input.addEventListener("input", draw);

  el.classList.add("rlw");
  el.append(chart.root, power.root, least.root, output);
  draw();
}

export default { render };
