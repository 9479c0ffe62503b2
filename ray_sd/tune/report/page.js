"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const one = (selector, within = document) => within.querySelector(selector);
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };

  // What the reader chose outlives a reload. A browser may refuse storage to files.
  const KEY = "ray_sd:" + location.pathname;
  let kept = {};
  try { kept = JSON.parse(sessionStorage.getItem(KEY)) || {}; } catch { /* nothing is kept then */ }
  const keep = (change) => {
    Object.assign(kept, change);
    try { sessionStorage.setItem(KEY, JSON.stringify(kept)); } catch { /* likewise */ }
  };

  function showTrial(index) {
    const row = one("#trial-" + index);
    all("#table tr.shown").forEach((other) => other.classList.remove("shown"));
    row.classList.add("shown");
    row.scrollIntoView({ block: "center" });
  }

  // --- charts
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 640px)");

  function template() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue("--" + name).trim();
    const family = getComputedStyle(document.body).fontFamily;
    const axis = {
      gridcolor: colour("line"), linecolor: colour("line"), zerolinecolor: colour("line"), tickcolor: colour("line"),
      automargin: true, title: { standoff: 10 },
    };
    return {
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { color: colour("text"), family, size: narrow.matches ? 11 : 13 },
        margin: narrow.matches ? { l: 44, r: 10, t: 30, b: 44 } : { l: 60, r: 20, t: 36, b: 52 },
        hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("text"), family, size: 12 }, align: "left" },
        hovermode: "closest", xaxis: axis, yaxis: axis,
        modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("faint"), activecolor: colour("text") },
      },
      data: {
        parcoords: [{
          labelfont: { color: colour("text"), size: 12 }, tickfont: { color: colour("text"), size: 11 },
          rangefont: { color: "rgba(0,0,0,0)", size: 1 },
          unselected: { line: { color: colour("line"), opacity: 0.35 } },
        }],
      },
    };
  }

  function draw(chart) {
    const figure = JSON.parse(one("script", chart).textContent);
    const settings = {
      responsive: true, displaylogo: false,
      // Named one by one, since plotly.js adds one that sends the chart to a server.
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], plotlyServerURL: "",
      // Over axes with labels at their tops the buttons would lie on these, bars need none, and phones have fingers.
      displayModeBar: narrow.matches || ["parcoords", "bar"].includes(figure.data[0].type) ? false : "hover",
    };
    const themed = () => ({ ...figure.layout, template: template() });
    Plotly.newPlot(chart, figure.data, themed(), settings);
    const recolour = () => Plotly.react(chart, figure.data, themed(), settings);
    dark.addEventListener("change", recolour);
    narrow.addEventListener("change", recolour);
    const pointed = one(".pointed", chart.closest("section"));
    if (pointed) {
      const lines = figure.data[0].meta;
      chart.on("plotly_hover", (event) => {
        const line = lines[event.curveNumber];
        if (line) pointed.innerHTML = line.replaceAll("<br>", " · ");
      });
      return;
    }
    chart.on("plotly_click", (event) => {
      const point = event.points[0];
      const trial = point.customdata || point.data.meta;
      if (trial) showTrial(trial[0]);
    });
  }

  // After all else, one by one, so that the page can be used before the last is drawn.
  addEventListener("DOMContentLoaded", async () => {
    for (const chart of all(".chart")) {
      await new Promise((go) => setTimeout(go));
      try { draw(chart); } catch (error) {
        chart.append(make("p", { class: "note" }, "This chart could not be drawn: " + error.message));
        console.error(error);
      }
    }
  });

  // --- pictures by settings
  function layGrid() {
    const { axes, trials } = JSON.parse(one("#grid-data").textContent);
    const form = one("#axes");
    const { x, y, prompt } = form.elements;
    axes.forEach((axis, i) => {
      x.append(new Option(axis.name, i));
      y.append(new Option(axis.name, i));
    });
    y.append(new Option("nothing", -1));
    const varied = axes.map((axis, i) => i).filter((i) => axes[i].columns.length > 1);
    x.value = varied[0] ?? 0;
    y.value = varied[1] ?? -1;
    if (axes.length < 2) y.closest("label").hidden = true;
    const chosen = kept.grid || {};
    for (const select of [x, y, prompt]) {
      if ([...select.options].some((option) => option.value === chosen[select.name])) select.value = chosen[select.name];
    }

    function cell(inside) {
      if (!inside.length) return make("td");
      const best = inside.reduce((a, b) => (trials[a].rank <= trials[b].rank ? a : b));
      const trial = trials[best];
      const link = make("a", { class: "cell " + trial.role, href: "#trial-" + best, title: trial.id + ": " + trial.settings });
      const source = one(`#picture-${best}-${prompt.value}`);
      const picture = source ? source.cloneNode() : make("span", { class: "no-picture" });
      picture.removeAttribute("id");
      link.append(picture);
      trial.values.forEach((value, i) => link.append(make(i ? "span" : "b", { class: "value" }, value)));
      link.append(make("span", { class: "badge " + trial.status }, trial.status));
      if (trial.role) link.append(" ", make("span", { class: "badge " + trial.role }, trial.role));
      if (inside.length > 1) link.append(make("small", {}, (trial.values.length ? "best of " : "") + inside.length + " trials"));
      link.addEventListener("click", (event) => { event.preventDefault(); showTrial(best); });
      return make("td", {}, link);
    }

    function lay() {
      keep({ grid: { x: x.value, y: y.value, prompt: prompt.value } });
      const across = axes[x.value];
      const down = y.value === x.value ? undefined : axes[y.value];
      const rows = down ? down.columns : [""];
      const head = make("tr", {}, make("td", {}, down ? `${down.name} ↓  ${across.name} →` : `${across.name} →`));
      across.columns.forEach((column) => head.append(make("th", { scope: "col" }, column)));
      const body = make("tbody");
      rows.forEach((name, r) => {
        const row = make("tr", {}, make("th", { scope: "row" }, name));
        across.columns.forEach((_, c) => row.append(cell(
          trials.map((_, i) => i).filter((i) => across.places[i] === c && (!down || down.places[i] === r)))));
        body.append(row);
      });
      one("#grid").style.setProperty("--columns", across.columns.length);
      one("#grid").replaceChildren(make("table", {}, make("thead", {}, head), body));
    }

    const sample = one("#table .pictures img");
    if (sample) {
      one("#grid").style.setProperty("--aspect", `${sample.width} / ${sample.height}`);
    }
    form.addEventListener("change", lay);
    lay();
  }
  if (one("#grid-data")) layGrid();

  // --- the table
  function sortBy(column, descending) {
    const heads = all("#table thead th");
    const body = one("#table tbody");
    const key = (row) => row.children[column].dataset.key;
    const rows = all("tr", body).sort((a, b) => {
      const [one, other] = [key(a), key(b)];
      if (one === "" || other === "") return (one === "") - (other === "");  // what is unknown stands last either way
      const [x, y] = [Number(one), Number(other)];
      const order = isNaN(x) || isNaN(y) ? (isNaN(x) - isNaN(y)) || one.localeCompare(other) : x - y;
      return descending ? -order : order;
    });
    body.append(...rows);
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
    keep({ sort: [heads[column].textContent, descending] });
  }
  all("#table thead th").forEach((head, column) => {
    const button = one("button", head);
    if (!button) return;
    button.addEventListener("click", () => sortBy(column, head.getAttribute("aria-sort") === "ascending"));
    if (kept.sort && kept.sort[0] === head.textContent) sortBy(column, kept.sort[1]);
  });

  // --- copy
  async function copy(text) {
    try { await navigator.clipboard.writeText(text); } catch {
      // Not every browser gives a page from a file its clipboard.
      const area = make("textarea", { readonly: "", style: "position:fixed;opacity:0" });
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  }
  all(".copy").forEach((button) => button.addEventListener("click", async () => {
    await copy(one("code", button.parentElement).textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }));

  // --- reloading while the sweep runs
  const written = one("#written");
  one("dd", written).textContent = new Date(document.lastModified).toLocaleString();
  written.hidden = false;
  const details = all("details");
  details.forEach((element, i) => { if (kept.open && kept.open[i]) element.open = true; });
  if (document.body.dataset.refresh) {
    if (kept.scroll !== undefined) {
      history.scrollRestoration = "manual";
      scrollTo({ top: kept.scroll, behavior: "instant" });
    }
    let touched = 0;
    for (const event of ["pointermove", "keydown", "wheel", "touchstart"]) {
      addEventListener(event, () => { touched = Date.now(); }, { passive: true });
    }
    const due = Date.now() + 1000 * Number(document.body.dataset.refresh);
    setInterval(() => {
      // Not under the reader's hands, and not where nobody looks.
      if (Date.now() < due || Date.now() - touched < 4000 || document.hidden || String(getSelection())) return;
      keep({ scroll: scrollY, open: details.map((element) => element.open) });
      location.reload();
    }, 1000);
  }
})();
