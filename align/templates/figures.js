// --- figures ---------------------------------------------------------------------------------------------------------

const figures = island("figures-data");
const front = island("front-data");

function draw(element) {
  if (!window.Plotly) return; // it comes last, and draws everything then
  const {data, layout} = figures[element.dataset.figure];
  const large = element.dataset.figure.startsWith("front:");
  const fit = (trace) =>
    narrow.matches && trace.marker?.showscale ? {...trace, marker: {...trace.marker, showscale: false}} : trace;
  Plotly.react(element, data.map(fit), {...layout, template: theme(large)}, {responsive: true, displayModeBar: false});
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

if (document.getElementById("axes")) setUpAxes(document.getElementById("axes"));

function drawFigures() {
  const again = drawWhenNear([...document.querySelectorAll("[data-figure]")], draw);
  dark.addEventListener("change", again);
  narrow.addEventListener("change", again);
}
