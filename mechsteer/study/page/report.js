"use strict";
(() => {
  const root = document.documentElement;
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const templates = read("templates");
  const plots = [...document.querySelectorAll(".plot")];
  const drawn = new Map();
  let chosen = null; // the reader's own choice; it ends with the page, because a file keeps nothing

  const theme = () => chosen || (prefersDark.matches ? "dark" : "light");

  function layoutOf(figure) {
    // A figure's own settings win over a template's, so only these few are taken from it.
    const layout = { ...figure.layout, template: templates[theme()], autosize: true };
    delete layout.width;
    delete layout.height;
    for (const name of ["paper_bgcolor", "plot_bgcolor"]) delete layout[name];
    const title = layout.title || {};
    const top = title.subtitle ? 76 : title.text ? 64 : 24;
    layout.margin = { l: 48, r: 12, t: top, b: 44, ...figure.layout.margin };
    const narrow = window.innerWidth < 640;
    // A finger on a figure scrolls the page.
    if (narrow || window.matchMedia("(pointer: coarse)").matches) layout.dragmode = false;
    for (const name of narrow ? Object.keys(layout).filter((key) => /^[xy]axis/.test(key)) : []) {
      const axis = { ...layout[name] };
      if (axis.title && axis.title.text) axis.title = { ...axis.title, text: wrapped(axis.title.text) };
      if (name.startsWith("y") && Array.isArray(axis.ticktext)) axis.ticktext = axis.ticktext.map(shortened);
      layout[name] = axis;
    }
    return layout;
  }

  function wrapped(title) {
    const lines = [""];
    for (const word of String(title).split(" ")) {
      if (lines.at(-1) && lines.at(-1).length + word.length > 34) lines.push("");
      lines[lines.length - 1] += (lines.at(-1) && " ") + word;
    }
    return lines.join("<br>");
  }

  function shortened(label) {
    const units = String(label).match(/&[^;\s]+;|<[^>]*>|./gsu) || [];
    return units.length > 22 ? units.slice(0, 21).join("") + "…" : label;
  }

  function draw(place) {
    if (drawn.has(place)) return;
    const figure = read("figure-" + place.dataset.figure);
    drawn.set(place, figure);
    const config = { responsive: true, displaylogo: false, displayModeBar: false, showTips: false };
    window.Plotly.newPlot(place, figure.data, layoutOf(figure), config);
  }

  function paint() {
    root.dataset.theme = theme();
    for (const [place, figure] of drawn) window.Plotly.react(place, figure.data, layoutOf(figure));
  }

  root.dataset.theme = theme();
  document.getElementById("theme").addEventListener("click", () => {
    chosen = theme() === "dark" ? "light" : "dark";
    paint();
  });
  prefersDark.addEventListener("change", paint);

  // In something folded text cannot be measured: such a figure is drawn when it unfolds.
  const unfolded = (place) => !place.closest("details:not([open])");
  document.addEventListener("toggle", () => plots.filter(unfolded).forEach(draw), true);

  // What is near the reader is drawn first, the rest one by one when there is nothing else to do.
  const near = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting && unfolded(entry.target)).forEach((entry) => draw(entry.target)),
    { rootMargin: "400px" },
  );
  plots.forEach((place) => near.observe(place));
  const later = window.requestIdleCallback || ((work) => setTimeout(work, 30));
  (function rest() {
    const next = plots.find((place) => !drawn.has(place) && unfolded(place));
    if (next) {
      draw(next);
      later(rest);
    } else {
      root.dataset.ready = "true";
    }
  })();

  window.addEventListener("beforeprint", () => {
    document.querySelectorAll("details:not(.code)").forEach((each) => (each.open = true));
    plots.forEach(draw);
  });

  // A link to something folded unfolds it.
  function unfold() {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let each = target && target.closest("details"); each; each = each.parentElement.closest("details")) each.open = true;
    if (target) target.scrollIntoView();
  }
  window.addEventListener("hashchange", unfold);

  for (const code of document.querySelectorAll("pre")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy";
    const frame = document.createElement("div");
    frame.className = "copied";
    code.replaceWith(frame);
    frame.append(code, button);
    button.addEventListener("click", async () => {
      const told = (text) => {
        button.textContent = text;
        setTimeout(() => (button.textContent = "Copy"), 1500);
      };
      try {
        await navigator.clipboard.writeText(code.textContent);
        told("Copied");
      } catch {
        // Where pages may not write to the clipboard, the lines are at least selected.
        getSelection().selectAllChildren(code);
        told("Selected");
      }
    });
  }

  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const read_on = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        const link = links.get(entry.target.id);
        if (!link || !entry.isIntersecting) continue;
        links.forEach((each) => each.removeAttribute("aria-current"));
        link.setAttribute("aria-current", "true");
      }
    },
    { rootMargin: "-20% 0px -70% 0px" },
  );
  document.querySelectorAll("main > section").forEach((section) => read_on.observe(section));
})();
