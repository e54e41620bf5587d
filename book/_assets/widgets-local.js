/* Runs after require.js and before embed-amd.js: widget modules and fonts come from this site, never from a CDN. */
(function () {
  "use strict";
  const me = document.currentScript;
  const here = new URL("vendor/widgets/", me.src).href;
  // html-manager reads this attribute for its fonts, and as the place to look for widget modules it does not know.
  me.setAttribute("data-jupyter-widgets-cdn", here);
  // "anywidget" -> anywidget.js; html-manager's fonts -> @jupyter-widgets/html-manager/dist/
  requirejs.config({ baseUrl: here });

  /** ipywidgets' own sliders have no accessible name: copy the visible label onto the handle. */
  function nameSliders() {
    for (const widget of document.querySelectorAll(".jupyter-widgets.widget-slider")) {
      const label = widget.querySelector(".widget-label");
      const handle = widget.querySelector("[role=slider]");
      if (label && handle && !handle.hasAttribute("aria-label")) {
        handle.setAttribute("aria-label", label.textContent || "value");
      }
    }
  }

  /** ipywidgets still calls the queue of MathJax 2; give it one that forwards to MathJax 3. */
  function bridgeMathJax() {
    if (!window.MathJax || window.MathJax.Hub) return;
    const typeset = (node) =>
      window.MathJax.startup.promise.then(() => window.MathJax.typesetPromise(node ? [node] : undefined));
    const runJob = (job) => {
      if (Array.isArray(job) && job[0] === "Typeset" && window.MathJax.typesetPromise) typeset(job[2]);
    };
    window.MathJax.Hub = { Queue: (...jobs) => jobs.forEach(runJob) };
  }

  window.addEventListener("load", () => {
    bridgeMathJax();
    nameSliders();
    new MutationObserver(nameSliders).observe(document.body, { childList: true, subtree: true });
  });
})();
