// A page that nobody has touched is loaded anew when files have grown; else a button offers it.
(() => {
  const news = document.getElementById("news");
  let touched = false;
  for (const kind of ["click", "input", "keydown"]) document.addEventListener(kind, () => (touched = true));
  news.querySelector("button").addEventListener("click", () => location.reload());
  setInterval(async () => {
    const answer = await fetch("version", {cache: "no-store"}).catch(() => null);
    if (!answer?.ok || (await answer.text()) === news.dataset.version) return;
    if (touched) news.hidden = false;
    else location.reload();
  }, 2000);
})();
