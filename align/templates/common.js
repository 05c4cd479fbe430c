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
