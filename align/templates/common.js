"use strict";

const island = (id) => JSON.parse(document.getElementById(id).textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 46rem)");

function theme(large) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const axis = {gridcolor: colour("--line"), linecolor: colour("--line"), zeroline: false, automargin: true};
  return {
    layout: {
      font: {family: "system-ui, sans-serif", size: large ? 13 : 12, color: colour("--ink")},
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      xaxis: axis,
      yaxis: axis,
      hoverlabel: {bgcolor: colour("--raised"), bordercolor: colour("--line"), font: {color: colour("--ink")}},
      legend: {orientation: "h", x: 0, y: 1, yanchor: "bottom"},
      margin: {l: 40, r: 12, t: 8, b: 36},
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    },
    data: {scatter: [{marker: {line: {color: colour("--ink")}}}]},
  };
}

function make(tag, text, className = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = className;
  return element;
}

// Plotly takes seconds to read on a slow machine: only once the page is on the screen, and what it waits for has come.
function withPlotly(waitedFor, draw) {
  const read = () => {
    const script = document.createElement("script");
    script.textContent = document.getElementById("plotly").textContent;
    document.getElementById("plotly").replaceWith(script);
    draw();
  };
  const afterPaint = () => requestAnimationFrame(() => setTimeout(read));
  waitedFor.then(afterPaint, afterPaint);
}

// Draws what is in the window or near it, and everything that is not drawn yet before the page is printed.
function drawWhenNear(elements, draw) {
  const observer = new IntersectionObserver((entries) => entries.filter((entry) => entry.isIntersecting).forEach(one), {rootMargin: "100%"});
  const waiting = new Set(elements);
  function one({target}) {
    observer.unobserve(target);
    if (waiting.delete(target)) draw(target);
  }
  waiting.forEach((element) => observer.observe(element));
  addEventListener("beforeprint", () => [...waiting].forEach((target) => one({target})));
  return () => elements.filter((element) => !waiting.has(element)).forEach(draw); // draws again what has been drawn
}
