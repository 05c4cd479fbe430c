
// --- samples: their text reaches the page through textContent alone --------------------------------------------------

const samples = island("samples-data");
const form = document.getElementById("filters");
const list = document.getElementById("rows")?.tBodies[0];
const ROWS = 20; // shown at once
const KEPT = 64; // chunks that stay in memory: those used last
const kept = new Map();
const arrived = new Map();
let chunks = []; // of the kind that is shown
let matches = []; // chunk * samples.most + row of every sample that passes, in the order of the list
let searches = 0;
let shows = 0;
let first = 0; // of `matches` in the list

const number = (value, digits = 6) => (value === null ? "–" : String(Number(value.toPrecision(digits))));
const count = (n) => n.toLocaleString("en");
const say = (text) => (document.getElementById("position").textContent = text);

// --- chunks

function samplesArrived(name, packed) { // called by the script of a chunk
  arrived.set(name, packed);
}

async function fetchChunk(name) {
  const script = document.createElement("script");
  await new Promise((resolve) => {
    script.onload = script.onerror = resolve;
    script.src = `${samples.folder}/${name}.js`;
    document.body.append(script);
  });
  script.remove();
  if (!arrived.has(name)) throw new Error(`samples could not be loaded: ${samples.folder}/${name}.js is not there or not whole`);
  const bytes = Uint8Array.from(atob(arrived.get(name)), (character) => character.charCodeAt(0));
  arrived.delete(name);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

function load(chunk) {
  const [name] = chunk;
  const found = kept.get(name) ?? fetchChunk(name);
  kept.delete(name);
  kept.set(name, found);
  if (kept.size > KEPT) kept.delete(kept.keys().next().value);
  found.catch(() => kept.delete(name)); // to be tried again
  return found;
}

// --- filters

function criteria() {
  const {from, to, text} = form.elements;
  const tests = [];
  const wanted = text.value.toLowerCase();
  const has = (string) => string.toLowerCase().includes(wanted);
  const within = (least, most) => (value) => value !== null && !(value < least.valueAsNumber) && !(value > most.valueAsNumber);
  const inSteps = within(from, to); // an empty limit is NaN and lets all pass
  if (from.value || to.value) tests.push((table, i) => inSteps(table.step[i]));
  for (const field of form.querySelectorAll("fieldset")) {
    const [least, most, there] = field.querySelectorAll("input, select");
    const values = `value/${field.dataset.objective}`;
    const inLimits = within(least, most);
    if (least.value || most.value) tests.push((table, i) => inLimits(table[values][i]));
    if (there.value) tests.push((table, i) => (table[values][i] === null) === (there.value === "no"));
  }
  if (wanted) tests.push((table, i) => has(table.text[i]) || has(table.prompts[table.prompt[i]]));
  return tests;
}

async function search() {
  const mine = ++searches;
  const {source, order, from, to} = form.elements;
  const [tests, sign, key] = [criteria(), order.value[0] === "-" ? -1 : 1, order.value.slice(1)];
  chunks = samples.chunks[source.value];
  const found = [];
  const keys = [];
  if (!tests.length && !key) { // nothing needs to be looked at
    chunks.forEach(([, rows], c) => Array.from({length: rows}, (_, i) => found.push(c * samples.most + i)));
    matches = found;
    return show(0);
  }
  matches = [];
  let shown = false;
  for (const [c, chunk] of chunks.entries()) {
    if (chunk[3] < from.valueAsNumber || chunk[2] > to.valueAsNumber) continue;
    if (c % 10 === 0 && !shown) say(`searching: ${count(found.length)} found`);
    if (chunks[c + 1]) load(chunks[c + 1]).catch(() => null); // the next is on its way meanwhile
    const table = await load(chunk);
    if (mine !== searches) return null;
    for (let i = 0; i < table.step.length; i++) {
      if (!tests.every((test) => test(table, i))) continue;
      found.push(c * samples.most + i);
      if (key) keys.push(table[key][i]);
    }
    if (key) continue;
    matches = found;
    if (!shown && found.length >= ROWS) {
      shown = true;
      await show(0);
    } else if (shown && c % 10 === 0) place(" so far");
  }
  if (key) {
    const places = [...found.keys()].sort((a, b) => (keys[a] === null) - (keys[b] === null) || sign * (keys[a] - keys[b]));
    matches = places.map((i) => found[i]); // missing ones last
  }
  return shown ? place() : show(0);
}

// --- the list

function place(more = "") {
  const last = Math.min(first + ROWS, matches.length);
  document.getElementById("previous").disabled = first === 0;
  document.getElementById("next").disabled = last >= matches.length;
  say(matches.length ? `${count(first + 1)} to ${count(last)} of ${count(matches.length)}${more}` : "no sample matches");
}

async function show(from) {
  const mine = ++shows;
  first = Math.max(0, from);
  const some = matches.slice(first, first + ROWS).map((match) => [Math.floor(match / samples.most), match % samples.most]);
  const tables = await Promise.all(some.map(([c]) => load(chunks[c])));
  if (mine !== shows) return;
  const rows = some.map(([, i], n) => [tables[n], i]).filter(([table, i]) => i < table.step.length); // a run in progress may have gone back
  list.replaceChildren(...rows.map(([table, i], n) => listed(table, i, first + n)));
  document.getElementById("sample").hidden = !rows.length;
  if (rows.length) open(list.rows[0]);
  place();
}

function listed(table, i, n) {
  const row = document.createElement("tr");
  const head = make("th", "");
  const button = make("button", count(n + 1));
  head.scope = "row";
  button.type = "button";
  head.append(button);
  row.append(head, make("td", String(table.step[i])));
  for (const text of [table.prompts[table.prompt[i]], table.text[i]]) {
    const cell = make("td", text.slice(0, 300), "text cut");
    cell.dir = "auto";
    row.append(cell);
  }
  for (const name of samples.objectives) {
    const value = table[`value/${name}`][i];
    row.append(make("td", value === null ? "missing" : number(value, 3), value === null ? "missing" : ""));
  }
  row.append(make("td", number(table.advantage[i], 3)));
  row.fill = () => fill(table, i);
  return row;
}

function open(row) {
  for (const other of list.rows) {
    other.classList.toggle("opened", other === row);
    other.querySelector("button").tabIndex = other === row ? 0 : -1; // Tab reaches one row, the arrows the others
  }
  row.fill();
}

// --- one sample

function fill(table, i) {
  document.getElementById("prompt").textContent = table.prompts[table.prompt[i]];
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

// --- what the user does

const orSay = (promise) => promise.catch((error) => say(error.message));

function setUpSamples() {
  form.addEventListener("input", () => orSay(search()));
  form.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("previous").addEventListener("click", () => orSay(show(first - ROWS)));
  document.getElementById("next").addEventListener("click", () => orSay(show(first + ROWS)));
  list.addEventListener("click", (event) => open(event.target.closest("tr")));
  list.addEventListener("keydown", (event) => {
    const rows = [...list.rows];
    const at = rows.indexOf(event.target.closest("tr"));
    const row = rows[{ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1}[event.key]];
    if (!row) return;
    event.preventDefault();
    open(row);
    row.querySelector("button").focus();
  });
  return orSay(search());
}

withPlotly(form ? setUpSamples() : Promise.resolve(), drawFigures);
