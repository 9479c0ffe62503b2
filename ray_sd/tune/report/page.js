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

  const number = (value) =>
    value && Math.abs(value) < 1e-3 ? value.toExponential(2).replace(/\.?0*e/, "e") : String(Number(value.toPrecision(3)));

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
    row.tabIndex = -1;
    row.focus({ preventScroll: true });  // so that Tab goes on from there
  }

  // --- which trials are shown: all, or those that pass the brushes
  let passing = null;
  const followers = [];
  const isShown = (trial) => !passing || passing.has(trial);

  function showOnly(trials) {
    passing = trials;
    followers.forEach((follow) => follow());
  }

  const rows = all("#table tbody tr");
  const trialOf = (row) => Number(row.id.slice("trial-".length));
  const filtered = one("#filtered");
  followers.push(() => {
    rows.forEach((row) => { row.hidden = !isShown(trialOf(row)); });
    filtered.hidden = !passing;
    if (passing) one("span", filtered).textContent = `${passing.size} of ${rows.length} trials`;
  });

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

  // A trace without the trials that are not shown. Of curves each is a trial's, of points each point is one.
  function thinned(trace) {
    if (trace.customdata) {
      const stays = trace.customdata.map(([trial]) => isShown(trial));
      const pick = (list) => (Array.isArray(list) ? list.filter((_, i) => stays[i]) : list);
      const { x, y, customdata, marker } = trace;
      const line = { ...marker.line, width: pick(marker.line.width) };
      return { ...trace, x: pick(x), y: pick(y), customdata: pick(customdata), marker: { ...marker, opacity: pick(marker.opacity), line } };
    }
    return trace.meta ? { ...trace, visible: isShown(trace.meta[0]) } : trace;
  }

  // The first of a kind that is shown stands in the legend.
  function legends(traces) {
    const seen = new Set();
    return traces.map((trace) => {
      if (!trace.legendgroup || !trace.visible) return trace;
      const showlegend = !seen.has(trace.legendgroup);
      seen.add(trace.legendgroup);
      return { ...trace, showlegend };
    });
  }

  async function unpackPlotly() {
    const packed = one("#plotly");
    if (!window.DecompressionStream) throw new Error("it takes a browser of 2023 or later");
    const bytes = Uint8Array.from(atob(packed.textContent), (letter) => letter.charCodeAt(0));
    const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = make("script", {}, await new Response(unpacked).text());
    document.head.append(script);
    packed.remove();
  }

  function draw(chart) {
    const figure = JSON.parse(one("script", chart).textContent);
    if (figure.data[0].type === "parcoords") brushAsKept(figure);
    const settings = {
      responsive: true, displaylogo: false,
      plotGlPixelRatio: 1, // its lines are one pixel of these wide, and at its usual two too faint
      // Named one by one, since plotly.js adds one that sends the chart to a server.
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], plotlyServerURL: "",
      // Over axes with labels at their tops the buttons would lie on these, bars need none, and phones have fingers.
      displayModeBar: narrow.matches || ["parcoords", "bar"].includes(figure.data[0].type) ? false : "hover",
    };
    const themed = () => ({ ...figure.layout, template: template() });
    const isParallel = figure.data[0].type === "parcoords";
    const traces = () => (isParallel ? figure.data : legends(figure.data.map(thinned)));
    Plotly.newPlot(chart, traces(), themed(), settings);
    const redraw = () => Plotly.react(chart, traces(), themed(), settings);
    dark.addEventListener("change", redraw);
    narrow.addEventListener("change", redraw);
    const pointed = one(".pointed", chart.closest("section"));
    if (isParallel) {
      followBrushes(chart, figure.layout.meta);
      const lines = figure.data[0].meta;
      chart.on("plotly_hover", (event) => {
        const line = lines[event.curveNumber];
        if (line) pointed.innerHTML = line.replaceAll("<br>", " · ");
      });
      return;
    }
    if (figure.data.some((trace) => trace.meta || trace.customdata)) followers.push(redraw);
    chart.on("plotly_click", (event) => {
      const point = event.points[0];
      const trial = point.customdata || point.data.meta;
      if (trial) showTrial(trial[0]);
    });
  }

  // After all else, one by one, so that the page can be used before the last is drawn.
  addEventListener("DOMContentLoaded", async () => {
    const charts = all(".chart");
    const sayWhy = (chart, error) => {
      chart.append(make("p", { class: "note" }, "This chart could not be drawn: " + error.message));
      console.error(error);
    };
    try { if (charts.length) await unpackPlotly(); } catch (error) {
      charts.forEach((chart) => sayWhy(chart, error));
      return;
    }
    for (const chart of charts) {
      await new Promise((go) => setTimeout(go));
      try { draw(chart); } catch (error) { sayWhy(chart, error); }
    }
  });

  // --- brushes on the parallel axes, and sliders that set them
  function brushAsKept(figure) {
    figure.layout.meta.axes.forEach((axis, i) => {
      const brush = (kept.brushes || {})[axis.name];
      if (brush) figure.data[0].dimensions[i].constraintrange = brush;
    });
  }

  function followBrushes(chart, { rows: trials, axes }) {
    const dimensions = () => chart.data[0].dimensions;
    // One range, or several, of which plotly makes a list.
    const rangesOf = ({ constraintrange }) =>
      !constraintrange ? null : Array.isArray(constraintrange[0]) ? constraintrange : [constraintrange];
    const brush = (ranges) => Plotly.restyle(
      chart, Object.fromEntries(ranges.map(([i, range]) => [`dimensions[${i}].constraintrange`, [range]])), [0]);

    const sliders = axes.map((axis, i) => {
      const { range: [low, high], tickvals, ticktext } = dimensions()[i];
      const step = axis.kind === "category" ? 1 : "any";
      const [from, to] = [low, high].map((value, end) => {
        const slider = make("input", { type: "range", min: low, max: high, step, "aria-label": `${axis.name}, ${end ? "to" : "from"}` });
        slider.value = value;
        return slider;
      });
      const said = make("output");
      const write = (value) => {
        if (axis.kind === "category") return ticktext[tickvals.indexOf(Math.round(value))];
        if (axis.absent !== null && value <= axis.absent) return ticktext[0];
        return number(axis.kind === "log" ? 10 ** value : value);
      };
      const say = () => {
        [from, to].forEach((slider) => slider.setAttribute("aria-valuetext", write(Number(slider.value))));
        said.textContent = `${write(Number(from.value))} … ${write(Number(to.value))}`;
      };
      from.addEventListener("input", () => { if (Number(from.value) > Number(to.value)) to.value = from.value; say(); });
      to.addEventListener("input", () => { if (Number(to.value) < Number(from.value)) from.value = to.value; say(); });
      const set = () => {
        const [start, end] = [Number(from.value), Number(to.value)];
        const room = axis.kind === "category" ? 0.3 : 0;
        brush([[i, start <= low && end >= high ? null : [start - room, end + room]]]);
      };
      from.addEventListener("change", set);
      to.addEventListener("change", set);
      one("#ranges").append(make("fieldset", {}, make("legend", {}, axis.name), from, to, said));
      return (ranges) => {
        const ends = ranges ? ranges.flat() : [low, high];
        from.value = Math.min(...ends);
        to.value = Math.max(...ends);
        say();
      };
    });

    function follow() {
      const brushes = dimensions().map(rangesOf);
      sliders.forEach((slide, i) => slide(brushes[i]));
      keep({ brushes: Object.fromEntries(axes.map((axis, i) => [axis.name, dimensions()[i].constraintrange]).filter(([, range]) => range)) });
      const passes = (place) => axes.every(({ places }, i) =>
        !brushes[i] || brushes[i].some(([low, high]) => low <= places[place] && places[place] <= high));
      showOnly(brushes.some(Boolean) ? new Set(trials.filter((_, place) => passes(place))) : null);
    }
    chart.on("plotly_restyle", follow);
    one("button", filtered).addEventListener("click", () => brush(axes.map((_, i) => [i, null])));
    follow();
  }

  // --- pictures by settings
  function layGrid() {
    const { axes, goals, trials } = JSON.parse(one("#grid-data").textContent);
    const form = one("#axes");
    const { x, y, prompt, seed, step } = form.elements;
    axes.forEach((axis, i) => {
      x.append(new Option(axis.name, i));
      y.append(new Option(axis.name, i));
    });
    y.append(new Option("nothing", -1));
    const varied = axes.map((axis, i) => i).filter((i) => axes[i].columns.length > 1);
    x.value = varied[0] ?? 0;
    y.value = varied[1] ?? -1;
    const differing = (values) => [...new Set(values)].sort((a, b) => a - b);
    differing(trials.map((trial) => trial.seed)).forEach((value) => seed.append(new Option(value, value)));
    differing(trials.flatMap((trial) => trial.drawn.map((drawn) => drawn.step))).reverse()
      .forEach((value) => step.append(new Option(value, value)));
    for (const [select, least] of [[y, 3], [prompt, 2], [seed, 3], [step, 3]]) {
      select.closest("label").hidden = select.options.length < least;
    }
    const chosen = kept.grid || {};
    for (const select of [x, y, prompt, seed, step]) {
      if ([...select.options].some((option) => option.value === chosen[select.name])) select.value = chosen[select.name];
    }

    // What a trial drew at the chosen step, or last.
    const drawnBy = (trial) => trial.drawn.find((drawn) => !step.value || drawn.step === Number(step.value));

    function pictureOf(index, number) {
      const drawn = drawnBy(trials[index]);
      if (drawn && !drawn.pictures) return one(`#picture-${index}-${number}`).cloneNode();
      const found = drawn && drawn.pictures[number];
      if (!found) return make("span", { class: "no-picture" });
      const [src, width, height, isSmall] = found;
      return make("img", { src, width, height, alt: `trial ${trials[index].id}: ${prompt.options[number].text}`, class: isSmall ? "small" : "" });
    }

    function words(index) {
      const trial = trials[index];
      const values = step.value ? (drawnBy(trial) || { values: goals.map(() => null) }).values : trial.values;
      const badges = [trial.status, trial.role].filter(Boolean).map((name) => make("span", { class: "badge " + name }, name));
      return { values, badges };
    }

    function cell(inside) {
      if (!inside.length) return make("td");
      // One that drew at the chosen step before a better one that did not.
      const order = (index) => [drawnBy(trials[index]) ? 0 : 1, trials[index].rank];
      const best = inside.reduce((a, b) => (order(a)[0] - order(b)[0] || order(a)[1] - order(b)[1]) <= 0 ? a : b);
      const trial = trials[best];
      const button = make("button", { type: "button", class: "cell " + trial.role, title: trial.id + ": " + trial.settings, "data-trial": best });
      const picture = pictureOf(best, Number(prompt.value));
      picture.removeAttribute("id");
      button.append(picture);
      const { values, badges } = words(best);
      values.forEach((value, i) => { if (value !== null) button.append(make(i ? "span" : "b", { class: "value" }, value)); });
      badges.forEach((badge) => button.append(badge, " "));
      if (inside.length > 1) button.append(make("small", {}, (trial.values.some(Boolean) ? "best of " : "") + inside.length + " trials"));
      button.addEventListener("click", () => enlarge(all("#grid .cell").map((other) => Number(other.dataset.trial)), best));
      return make("td", {}, button);
    }

    // --- one picture, large: arrows go to the other trials, and to the other prompts of the same
    const large = one("#large");
    let [around, at, opener] = [[], 0, null];

    function enlarge(others, index) {
      [around, at, opener] = [others, others.indexOf(index), document.activeElement];
      fill();
      if (!large.open) large.showModal();
    }

    function fill() {
      const index = around[at];
      const trial = trials[index];
      const picture = pictureOf(index, Number(prompt.value));
      picture.removeAttribute("id");
      one(".frame", large).replaceChildren(picture);
      const { values, badges } = words(index);
      const drawn = drawnBy(trial);
      one(".caption", large).replaceChildren(make("b", {}, `trial ${trial.id} `), ...badges.flatMap((badge) => [badge, " "]),
        [drawn ? `step ${drawn.step}` : "no picture at this step",
          ...goals.map((goal, i) => values[i] && `${goal} ${values[i]}`).filter(Boolean)].join(" · "));
      one(".faint", large).textContent = [prompt.selectedOptions[0].text, trial.settings].filter(Boolean).join(" · ");
      one("a", large).href = "#trial-" + index;
    }

    function turn(key) {
      if (key === "Escape") large.close();
      const [trialBy, promptBy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key] || [0, 0];
      at = (at + trialBy + around.length) % around.length;
      if (promptBy) {
        prompt.value = (Number(prompt.value) + promptBy + prompt.options.length) % prompt.options.length;
        lay();
      }
      if (trialBy || promptBy) fill();
      return trialBy || promptBy;
    }

    large.addEventListener("keydown", (event) => { if (turn(event.key)) event.preventDefault(); });
    large.addEventListener("click", (event) => {
      if (event.target === large) large.close();  // beside it
      if (event.target.dataset.key) turn(event.target.dataset.key);
    });
    // Where another prompt was chosen, the button that it was opened by is there no more.
    large.addEventListener("close", () => {
      if (!opener.isConnected) one(`#grid [data-trial="${around[at]}"]`)?.focus();
    });
    one("a", large).addEventListener("click", (event) => {
      event.preventDefault();
      large.close();
      showTrial(around[at]);
    });
    all("#table .pictures button").forEach((button) => button.addEventListener("click", (event) => {
      const pictures = [...button.children];
      step.value = "";
      prompt.value = Math.max(0, pictures.indexOf(event.target));
      lay();
      const drew = all("#table tbody tr").filter((row) => !row.hidden && one(".pictures button", row)).map(trialOf);
      enlarge(drew, trialOf(button.closest("tr")));
    }));

    function lay() {
      keep({ grid: Object.fromEntries([x, y, prompt, seed, step].map((select) => [select.name, select.value])) });
      const across = axes[x.value];
      const down = y.value === x.value ? undefined : axes[y.value];
      const lines = down ? down.columns : [""];
      const laid = trials.map((_, i) => i).filter((i) => isShown(i) && (!seed.value || trials[i].seed === Number(seed.value)));
      const head = make("tr", {}, make("td", {}, down ? `${down.name} ↓  ${across.name} →` : `${across.name} →`));
      across.columns.forEach((column) => head.append(make("th", { scope: "col" }, column)));
      const body = make("tbody");
      lines.forEach((name, r) => {
        const row = make("tr", {}, make("th", { scope: "row" }, name));
        across.columns.forEach((_, c) => row.append(cell(
          laid.filter((i) => across.places[i] === c && (!down || down.places[i] === r)))));
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
    followers.push(lay);
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
      if (Date.now() < due || Date.now() - touched < 4000 || document.hidden || one("dialog[open]") || String(getSelection())) return;
      keep({ scroll: scrollY, open: details.map((element) => element.open) });
      location.reload();
    }, 1000);
  }
})();
