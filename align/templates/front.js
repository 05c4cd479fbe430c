// Names and model text reach the page through textContent, or escaped in the labels of plotly, which reads tags in them.

const front = island("front-data");
const points = front.points.map((point, index) => ({...point, index}));
const axes = document.getElementById("axes");
const curves = document.getElementById("curves");
const cloud = document.getElementById("cloud");
const table = document.getElementById("policies");
const methodsOf = Object.keys(front.looks);
const finder = document.getElementById("finder");
const MUTED = "#8a939c";
const MAX_FOUND = 30; // examples shown at once
const hidden = new Set(); // methods
let opened = -1;

const label = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const known = (value) => value !== null && value !== undefined;
const figures = (value, name) => (known(value) ? value.toFixed(front.decimals[name]) : "–");
const plain = (value) => (known(value) ? Number(value.toPrecision(6)).toLocaleString("en") : "–");
const isObjective = (name) => front.names.includes(name);
const value = (point, name, part) => (isObjective(name) ? point[part].values[name] : point[name]);
const error = (point, name, part) => (isObjective(name) ? point[part].standard_errors[name] : null);

function isShown(point) {
  return !hidden.has(point.method) && (axes.elements.which.value === "all" || point.on_front);
}

function interval(point, name) {
  const [mean, deviation] = [point.test.values[name], point.test.standard_errors[name]];
  if (!known(mean) || !known(deviation)) return "–";
  return `${figures(mean - front.z * deviation, name)} to ${figures(mean + front.z * deviation, name)}`;
}

// --- the policies in two objectives ----------------------------------------------------------------------------------

function hover(point) {
  const measured = front.names.map((name) => {
    const [mean, weight] = [point.test.values[name], point.weights[name]];
    const range = known(mean) ? `${figures(mean, name)} (${interval(point, name)})` : "missing";
    return `${label(name)}: ${range}${known(weight) ? `, weight ${plain(weight)}` : ""}`;
  });
  const [name, ...where] = new Set([point.id, point.method, point.path, ...parents(point)]);
  return [`<b>${label(shorten(name))}</b>`, ...where.map((text) => label(shorten(text))), ...measured].join("<br>");
}

// Of a merged model: its coefficients, with what they are of.
function parents(point) {
  const of = Object.entries(point.weights).filter(([name]) => !front.names.includes(name));
  return of.map(([name, weight]) => `${plain(weight)} of ${name}`);
}

const shorten = (text) => (text.length > 60 ? `${text.slice(0, 20)}…${text.slice(-38)}` : text);

function cloudOf(method, x, y, part) {
  const some = points.filter((point) => point.method === method && isShown(point) && known(value(point, x, part)) && known(value(point, y, part)));
  const {colour, symbol} = front.looks[method];
  const bars = axes.elements.bars.value;
  const barsOf = (name) => ({
    type: "data",
    array: some.map((point) => (bars === "all" || (bars === "front" && point.on_front) ? error(point, name, part) ?? 0 : 0)),
    color: MUTED,
    thickness: 1,
    width: 0,
  });
  return {
    type: "scatter",
    mode: "markers",
    x: some.map((point) => value(point, x, part)),
    y: some.map((point) => value(point, y, part)),
    error_x: barsOf(x),
    error_y: barsOf(y),
    customdata: some.map((point) => point.index),
    marker: {
      color: colour,
      symbol,
      size: some.map((point) => (point.on_front ? 12 : 8)),
      opacity: some.map((point) => (point.on_front ? 1 : 0.5)),
      line: {width: some.map((point) => (point.on_front ? 1.5 : 0))},
    },
    hovertext: some.map(hover),
    hoverinfo: "text",
    cliponaxis: false,
  };
}

// What a share of the runs of a method reaches in both axes, measured on test: its border, down to the worst that is shown.
function surfaceOf(method, x, y, part) {
  const wanted = axes.elements.attained.value;
  const levels = front.planes.filter((level) => level.method === method && [x, y].includes(level.x) && [x, y].includes(level.y));
  const level = {any: levels[0], half: levels.find(({share}) => share >= 0.5 - 1e-9), all: levels.find(({share}) => share > 1 - 1e-9)}[wanted];
  if (!level || part !== "test" || x === y) return [];
  const [xs, ys] = level.x === x ? [level.xs, level.ys] : [level.ys, level.xs];
  const better = (name) => (front.maximized[name] ? 1 : -1);
  const corners = xs.map((a, i) => [a, ys[i]]).sort((a, b) => better(x) * (a[0] - b[0]));
  const worst = ([name, own]) => [...points.filter(isShown).map((point) => value(point, name, part)).filter(known), ...own]
    .reduce((a, b) => (better(name) * (a - b) < 0 ? a : b));
  const path = [[worst([x, xs]), corners[0][1]]];
  for (const [a, b] of corners) path.push([path.at(-1)[0], b], [a, b]);
  path.push([path.at(-1)[0], worst([y, ys])]);
  return [{
    type: "scatter",
    mode: "lines",
    x: path.map(([a]) => a),
    y: path.map(([, b]) => b),
    line: {color: front.looks[method].colour, width: 1.8},
    hovertext: `${label(method)}: attained by ${plain(100 * level.share)} % of its runs`,
    hoverinfo: "text",
  }];
}

function drawCloud() {
  if (!window.Plotly) return; // it comes last, and draws everything then
  const [x, y, part] = ["x", "y", "part"].map((name) => axes.elements[name].value);
  const corners = isObjective(x) && isObjective(y) ? front.stairs[part][x][y] : [[], []];
  const stairs = {type: "scatter", mode: "lines", x: corners[0], y: corners[1], hoverinfo: "skip"};
  stairs.line = {color: MUTED, width: 1.5, dash: "dot"};
  const ring = {type: "scatter", mode: "markers", x: [], y: [], hoverinfo: "skip", cliponaxis: false};
  const point = points[opened];
  if (point && isShown(point)) [ring.x, ring.y] = [[value(point, x, part)], [value(point, y, part)]];
  const template = theme(true);
  ring.marker = {symbol: "circle-open", size: 22, color: template.layout.font.color, line: {width: 2}};
  const layout = {
    template,
    showlegend: false,
    hovermode: "closest",
    xaxis: {title: {text: label(front.titles[x] ?? front.costs[x])}},
    yaxis: {title: {text: label(front.titles[y] ?? front.costs[y])}},
  };
  const surfaces = methodsOf.filter((method) => !hidden.has(method)).flatMap((method) => surfaceOf(method, x, y, part));
  const traces = [stairs, ...surfaces, ...methodsOf.map((method) => cloudOf(method, x, y, part)), ring];
  Plotly.react(cloud, traces, layout, {responsive: true, displayModeBar: false});
}

function setUpAxes() {
  const {x, y} = axes.elements;
  const costs = Object.keys(front.costs).filter((key) => new Set(points.map((point) => point[key]).filter(known)).size > 1);
  for (const select of [x, y]) {
    select.append(...front.names.map((name) => new Option(name, name)), ...costs.map((key) => new Option(front.costs[key], key)));
  }
  let [oldX, oldY] = front.names.length > 1 ? front.shown : [costs[0] ?? front.names[0], front.names[0]];
  [x.value, y.value] = [oldX, oldY];
  axes.addEventListener("change", (event) => {
    if (x.value === y.value) {
      if (event.target === x) y.value = oldX;
      else x.value = oldY;
    }
    [oldX, oldY] = [x.value, y.value];
    showRows();
    showExamples();
    drawCloud();
  });
  document.getElementById("attained").hidden = !front.planes.length;
  for (const form of [axes, finder]) form.addEventListener("submit", (event) => event.preventDefault());
  finder.addEventListener("input", showExamples);
}

// --- one policy ------------------------------------------------------------------------------------------------------

function show(index) {
  opened = index;
  const point = points[index];
  const chosen = point.on_front
    ? "on the front"
    : `not on the front${point.on_test_front ? ", but would be if the test prompts chose" : ""}`;
  document.getElementById("policy-name").textContent = point.id;
  document.getElementById("policy-kind").textContent = `${point.method} · ${chosen}`;
  document.getElementById("values").replaceChildren(...front.names.flatMap((name) => valueRows(point, name)));
  const details = {
    run: point.run || null,
    path: point.path,
    merged: parents(point).join(" + ") || null,
    step: plain(point.step),
    seed: known(point.seed) ? String(point.seed) : null,
    samples: plain(point.samples),
    tokens: plain(point.tokens),
    seconds: plain(point.seconds),
  };
  const pairs = Object.entries(details).filter(([, text]) => known(text) && text !== "–");
  document.getElementById("details").replaceChildren(...pairs.flatMap(([name, text]) => [make("dt", name), make("dd", text)]));
  showExamples();
  for (const row of table.tBodies[0].rows) row.classList.toggle("opened", Number(row.dataset.point) === index);
  rove(buttonOf(index));
  place();
  drawCloud();
}

function valueRows(point, name) {
  const {test, validation, weights} = point;
  const row = make("tr", "");
  const head = make("th", name, "text");
  head.scope = "row";
  const here = known(test.values[name]);
  row.append(head, make("td", here ? figures(test.values[name], name) : "missing", here ? "" : "missing"));
  row.append(make("td", interval(point, name)), make("td", plain(weights[name])));
  row.append(make("td", figures(validation.values[name], name)));
  if (!test.missing[name]) return [row];
  const share = make("tr", "", "reason");
  const cell = make("td", `${plain(100 * test.missing[name])} % of the values are missing`);
  cell.colSpan = 5;
  share.append(cell);
  return [row, share];
}

// Those of the policy that is open, or of all that are shown, where a text is looked for.
function showExamples() {
  const wanted = finder.elements.text.value.toLowerCase();
  const has = (text) => text.toLowerCase().includes(wanted);
  const some = wanted ? points.filter(isShown) : points.slice(opened, opened + 1);
  const found = some.flatMap((point) =>
    point.examples.filter(({prompt, text}) => has(prompt) || has(text)).map((kept) => [kept, wanted ? point.id : ""]),
  );
  const none = make("p", wanted ? "No example has this text." : "No completion was kept.", "note");
  const boxes = found.slice(0, MAX_FOUND).map(([kept, id], i) => example(kept, i, id));
  document.getElementById("examples").replaceChildren(...(boxes.length ? boxes : [none]));
  document.getElementById("examples-title").textContent = wanted ? "Examples that have the text" : `Examples of ${points[opened].id}`;
  const more = found.length > boxes.length ? `, the first ${boxes.length} are shown` : "";
  document.getElementById("found").textContent = wanted ? `${found.length} found${more}` : "";
}

function example(kept, i, id) {
  const box = make("div", "");
  if (id) box.append(make("p", id, "note"));
  for (const [title, text] of [["Prompt", kept.prompt], ["Completion", kept.text]]) {
    const head = make("h4", `${title} ${i + 1}`);
    head.id = `${title}-${i}`;
    const content = make("pre", text);
    content.dir = "auto";
    content.tabIndex = 0;
    content.setAttribute("role", "region");
    content.setAttribute("aria-labelledby", head.id);
    box.append(head, content);
  }
  const values = front.names.filter((name) => name in kept.values).map((name) => `${name} ${known(kept.values[name]) ? plain(kept.values[name]) : "missing"}`);
  box.append(make("p", values.join(" · "), "note"));
  return box;
}

// --- the table -------------------------------------------------------------------------------------------------------

const rowsShown = () => [...table.tBodies[0].rows].filter((row) => !row.hidden);
const buttonOf = (index) => table.querySelector(`tr[data-point="${index}"] button`);

function rove(button) { // one row can be reached by Tab, the others from it by the arrows
  for (const other of table.tBodies[0].querySelectorAll("button")) other.tabIndex = other === button ? 0 : -1;
}

function place() {
  const rows = rowsShown();
  const at = rows.findIndex((row) => Number(row.dataset.point) === opened);
  document.getElementById("position").textContent = at < 0 ? "" : `${at + 1} of ${rows.length}`;
  document.getElementById("previous").disabled = at <= 0;
  document.getElementById("next").disabled = at < 0 ? !rows.length : at === rows.length - 1;
}

function step(by) {
  const rows = rowsShown();
  const at = rows.findIndex((row) => Number(row.dataset.point) === opened);
  const row = rows[at + by];
  if (row) show(Number(row.dataset.point));
}

function showRows() {
  for (const row of table.tBodies[0].rows) row.hidden = !isShown(points[row.dataset.point]);
  const rows = rowsShown();
  if (rows.length && !rows.some((row) => row.querySelector("button").tabIndex === 0)) rove(rows[0].querySelector("button"));
  place();
}

function sortBy(head) {
  const falls = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", falls ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows].map((row) => [row.cells[head.cellIndex].dataset.sort, row]);
  const sign = falls ? -1 : 1;
  const numbers = rows.every(([key]) => key === "" || Number.isFinite(Number(key)));
  const order = (a, b) => (numbers ? Number(a) - Number(b) : a.localeCompare(b, "en", {numeric: true}));
  rows.sort(([a], [b]) => (a === "") - (b === "") || sign * order(a, b)); // what is missing comes last
  table.tBodies[0].append(...rows.map(([, row]) => row));
  place();
}

function setUpTable() {
  table.tHead.addEventListener("click", (event) => {
    if (event.target.closest("button")) sortBy(event.target.closest("th"));
  });
  table.tBodies[0].addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    show(Number(row.dataset.point));
    if (event.detail === 0) document.getElementById("policy-name").focus(); // opened by a key
  });
  table.tBodies[0].addEventListener("keydown", (event) => {
    const rows = rowsShown();
    const at = rows.indexOf(event.target.closest("tr"));
    const to = {ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1}[event.key];
    if (to === undefined || !rows[to]) return;
    event.preventDefault();
    const button = rows[to].querySelector("button");
    rove(button);
    button.focus();
  });
  const back = () => buttonOf(opened)?.focus();
  document.getElementById("back").addEventListener("click", back);
  document.getElementById("policy").addEventListener("keydown", (event) => event.key === "Escape" && back());
  document.getElementById("previous").addEventListener("click", () => step(-1));
  document.getElementById("next").addEventListener("click", () => step(1));
}

// --- methods ---------------------------------------------------------------------------------------------------------

const methodsShown = () => front.methods.filter((found) => !hidden.has(found.method));
const bandOf = (row, key) => (key === "hypervolume" ? {mean: row.hypervolume, low: row.low, high: row.high} : row[key]);
const look = (method) => front.looks[method] ?? {colour: MUTED, symbol: "circle"};
const tail = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

function drawForest() {
  const key = curves.elements.indicator.value;
  const some = methodsShown().filter((found) => known(found[key].mean)).sort((a, b) => a[key].mean - b[key].mean);
  const bar = (side) => some.map(({[key]: {mean, low, high}}) => Math.max(0, side === "high" ? (high ?? mean) - mean : mean - (low ?? mean)));
  const trace = {
    type: "scatter",
    mode: "markers",
    x: some.map((found) => found[key].mean),
    y: some.map((found, i) => i),
    error_x: {type: "data", symmetric: false, array: bar("high"), arrayminus: bar("low"), color: MUTED, thickness: 1.5, width: 4},
    marker: {size: 10, color: some.map((found) => look(found.method).colour), symbol: some.map((found) => look(found.method).symbol)},
    hovertext: some.map((found) => `${label(found.method)}: ${plain(found[key].mean)} (${plain(found[key].low)} to ${plain(found[key].high)})`),
    hoverinfo: "text",
  };
  const length = narrow.matches ? 16 : 34;
  const element = document.getElementById("forest");
  element.style.height = `${Math.max(360, 60 + 22 * some.length)}px`;
  const layout = {
    template: theme(false),
    showlegend: false,
    hovermode: "closest",
    xaxis: {title: {text: front.indicators[key]}},
    yaxis: {tickvals: trace.y, ticktext: some.map((found) => label(tail(found.method, length))), range: [-0.7, some.length - 0.3], showgrid: false},
  };
  Plotly.react(element, [trace], layout, {responsive: true, displayModeBar: false});
}

function drawCurve() {
  if (document.getElementById("curve-figure").hidden) return;
  const [key, x] = [curves.elements.indicator.value, curves.elements.x.value];
  const traces = methodsShown().flatMap(({method, curve}) => {
    const rows = curve.filter((row) => known(row[x]) && known(bandOf(row, key).mean));
    const banded = rows.filter((row) => known(bandOf(row, key).low) && known(bandOf(row, key).high));
    const back = [...banded].reverse();
    const {colour, symbol} = look(method);
    const band = {
      type: "scatter",
      mode: "lines",
      x: [...banded, ...back].map((row) => row[x]),
      y: [...banded.map((row) => bandOf(row, key).high), ...back.map((row) => bandOf(row, key).low)],
      fill: "toself",
      fillcolor: `${colour}1f`,
      line: {width: 0},
      hoverinfo: "skip",
    };
    const line = {
      type: "scatter",
      mode: "lines+markers",
      x: rows.map((row) => row[x]),
      y: rows.map((row) => bandOf(row, key).mean),
      line: {color: colour, width: 1.8},
      marker: {color: colour, symbol, size: 7},
      hovertext: rows.map((row) => `${label(method)}, ${label(front.costs[x])} ${plain(row[x])}: ${plain(bandOf(row, key).mean)}`),
      hoverinfo: "text",
    };
    return [band, line];
  });
  const layout = {
    template: theme(false),
    showlegend: false,
    hovermode: "closest",
    xaxis: {title: {text: front.costs[x]}},
    yaxis: {title: {text: front.indicators[key]}},
  };
  Plotly.react(document.getElementById("curve"), traces, layout, {responsive: true, displayModeBar: false});
}

function setUpMethods() {
  const rows = front.methods.flatMap((found) => (found.curve.length > 1 ? found.curve : []));
  const costs = Object.keys(front.costs).filter((key) => rows.some((row) => known(row[key])));
  curves.elements.x.append(...costs.map((key) => new Option(front.costs[key], key)));
  document.getElementById("curve-figure").hidden = document.getElementById("against").hidden = !costs.length;
  curves.addEventListener("change", drawMethods);
  curves.addEventListener("submit", (event) => event.preventDefault());
  [...document.querySelectorAll("#legend button")].forEach((button, i) =>
    button.addEventListener("click", () => {
      const method = methodsOf[i];
      if (!hidden.delete(method)) hidden.add(method);
      button.setAttribute("aria-pressed", String(!hidden.has(method)));
      showRows();
      showExamples();
      drawAll();
    }),
  );
}

function drawMethods() {
  if (!window.Plotly) return;
  drawForest();
  drawCurve();
}

function drawAll() {
  drawCloud();
  drawMethods();
}

setUpAxes();
setUpTable();
setUpMethods();
showRows();
show(Math.max(0, points.findIndex((point) => point.on_front)));
withPlotly(Promise.resolve(), () => {
  drawAll();
  cloud.on("plotly_click", ({points: [hit]}) => known(hit.customdata) && show(hit.customdata));
});
dark.addEventListener("change", drawAll);
narrow.addEventListener("change", drawAll);
