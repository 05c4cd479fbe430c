// --- figures ---------------------------------------------------------------------------------------------------------

const figures = island("figures-data");
const front = island("front-data");

function draw(element) {
  const {data, layout} = figures[element.dataset.figure];
  const large = element.dataset.figure.startsWith("front:");
  const fit = (trace) =>
    narrow.matches && trace.marker?.showscale ? {...trace, marker: {...trace.marker, showscale: false}} : trace;
  Plotly.react(element, data.map(fit), {...layout, template: theme(large)}, {responsive: true, displayModeBar: false});
}

function drawAll() {
  document.querySelectorAll("[data-figure]").forEach(draw);
}

function chooseAxes(x, y) {
  const {data, layout} = figures["front:0"];
  [data[0].x, data[0].y] = front.stairs[x][y];
  data.slice(1).forEach((trace, i) => {
    for (const [axis, name] of [["x", x], ["y", y]]) {
      trace[axis] = front.traces[name][i].values;
      trace[`error_${axis}`] = {...trace[`error_${axis}`], array: front.traces[name][i].standard_errors};
      layout[`${axis}axis`] = {title: {text: front.titles[name]}};
    }
  });
  draw(document.querySelector('[data-figure="front:0"]'));
}

function setUpAxes(form) {
  const {x, y} = form.elements;
  let [oldX, oldY] = front.shown;
  for (const select of [x, y]) select.append(...front.names.map((name) => new Option(name, name)));
  [x.value, y.value] = [oldX, oldY];
  form.addEventListener("change", (event) => {
    if (x.value === y.value) {
      if (event.target === x) y.value = oldX;
      else x.value = oldY;
    }
    [oldX, oldY] = [x.value, y.value];
    chooseAxes(oldX, oldY);
  });
}

drawAll();
dark.addEventListener("change", drawAll);
narrow.addEventListener("change", drawAll);
if (document.getElementById("axes")) setUpAxes(document.getElementById("axes"));

// --- samples: their text reaches the page through textContent alone --------------------------------------------------

const samples = island("samples-data");
const form = document.getElementById("filters");
const SOURCES = {training: "Training", held_out: "Held out"};
let rows = [];
let place = 0;

const columns = () => samples[form.elements.source.value].columns;
const number = (value) => (value === null ? "–" : String(Number(value.toPrecision(6))));

function listSteps() {
  const what = form.elements.source.value === "held_out" ? "all evaluations" : "all steps";
  const steps = [...new Set(columns().step)].map((step) => new Option(step, step));
  form.elements.step.replaceChildren(new Option(what, ""), ...steps);
}

function select() {
  const {source, step, text, objective, condition, limit, order} = form.elements;
  const table = columns();
  const prompts = samples[source.value].prompts;
  const values = table[`value/${objective.value}`];
  const key = order.value === "advantage" ? table.advantage : values;
  const sign = order.value === "up" ? 1 : -1;
  const wanted = text.value.toLowerCase();
  const accepts = {
    any: () => true,
    least: (value) => value !== null && !(value < limit.valueAsNumber), // an empty limit is NaN and lets all pass
    most: (value) => value !== null && !(value > limit.valueAsNumber),
    missing: (value) => value === null,
  }[condition.value];
  const has = (string) => string.toLowerCase().includes(wanted);
  limit.disabled = !["least", "most"].includes(condition.value);
  rows = [...table.step.keys()].filter(
    (i) =>
      (step.value === "" || table.step[i] === Number(step.value)) &&
      accepts(values[i]) &&
      (wanted === "" || has(table.text[i]) || has(prompts[table.prompt[i]])),
  );
  if (order.value !== "none") {
    rows.sort((a, b) => (key[a] === null) - (key[b] === null) || sign * (key[a] - key[b])); // missing ones last
  }
  show(0);
}

function show(wanted) {
  place = Math.max(0, Math.min(wanted, rows.length - 1));
  document.getElementById("previous").disabled = place === 0;
  document.getElementById("next").disabled = place >= rows.length - 1;
  document.getElementById("sample").hidden = rows.length === 0;
  document.getElementById("position").textContent =
    rows.length ? `${(place + 1).toLocaleString("en")} of ${rows.length.toLocaleString("en")}` : "no sample matches";
  if (rows.length) fill(columns(), rows[place]);
}

function fill(table, i) {
  const prompts = samples[form.elements.source.value].prompts;
  document.getElementById("prompt").textContent = prompts[table.prompt[i]];
  document.getElementById("completion").textContent = table.text[i];
  document.getElementById("values").replaceChildren(...samples.objectives.flatMap((name) => valueRows(table, i, name)));
  const details = {
    step: table.step[i],
    "prompt id": table.prompt_id[i],
    "sample of its group": table.sample[i] + 1,
    advantage: number(table.advantage[i]),
    tokens: table.tokens[i],
    ended: {stop: "by itself", length: "at the token limit"}[table.finish_reason[i]] ?? table.finish_reason[i],
    "policy version": table.policy_version[i],
  };
  const pairs = Object.entries(details).flatMap(([label, text]) => [make("dt", label), make("dd", text)]);
  document.getElementById("details").replaceChildren(...pairs);
}

function valueRows(table, i, name) {
  const value = table[`value/${name}`][i];
  const row = make("tr", "");
  const head = make("th", name, "text");
  head.scope = "row";
  row.append(head, make("td", value === null ? "missing" : number(value), value === null ? "missing" : ""));
  row.append(make("td", number(table[`weight/${name}`][i])));
  if (value !== null) return [row];
  const reason = make("tr", "", "reason");
  const cell = make("td", table[`error/${name}`][i] ?? "left out on purpose");
  cell.colSpan = 3;
  reason.append(cell);
  return [row, reason];
}

if (form) {
  const kinds = Object.keys(SOURCES).filter((kind) => samples[kind].columns.step);
  form.elements.source.append(...kinds.map((kind) => new Option(SOURCES[kind], kind)));
  form.elements.objective.append(...samples.objectives.map((name) => new Option(name, name)));
  listSteps();
  form.addEventListener("input", (event) => {
    if (event.target === form.elements.source) listSteps();
    select();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("previous").addEventListener("click", () => show(place - 1));
  document.getElementById("next").addEventListener("click", () => show(place + 1));
  select();
}
