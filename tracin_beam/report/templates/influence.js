"use strict";
// Search and filters over the test examples, all of which are in the page already.
(() => {
  const $ = (id) => document.getElementById(id);
  const articles = [...document.querySelectorAll("article")];
  if (articles.length < 2) return;
  const texts = articles.map((article) => article.querySelector(".test").textContent.toLowerCase());
  const links = articles.map((article) => document.querySelector(`nav a[href="#${article.id}"]`));

  const choices = ["label", "prediction"].map((name) => {
    const control = $(`choose-${name}`);
    const counts = new Map();
    for (const { dataset } of articles) counts.set(dataset[name], (counts.get(dataset[name]) || 0) + 1);
    for (const [value, count] of [...counts].sort((a, b) => b[1] - a[1])) {
      control.add(new Option(`${value} (${count})`, value));
    }
    control.parentElement.hidden = counts.size < 2;
    // By its place, as a label may be empty.
    return (article) => control.selectedIndex === 0 || article.dataset[name] === control.value;
  });
  const wrong = articles.filter((article) => article.hasAttribute("data-wrong")).length;
  $("wrong").parentElement.hidden = wrong === 0 || wrong === articles.length;

  function filter() {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    articles.forEach((article, i) => {
      const passes =
        words.every((word) => texts[i].includes(word)) &&
        choices.every((choice) => choice(article)) &&
        (!$("wrong").checked || article.hasAttribute("data-wrong"));
      article.hidden = links[i].hidden = !passes;
      shown += passes ? 1 : 0;
    });
    $("count").textContent =
      shown === articles.length ? "" : `${shown} of the ${articles.length} test examples here`;
  }

  // The next or previous of those that are shown, from where the page is scrolled to.
  function step(by) {
    const shown = articles.filter((article) => !article.hidden);
    const tops = shown.map((article) => article.getBoundingClientRect().top);
    const at = by > 0 ? tops.findIndex((top) => top > 8) : tops.findLastIndex((top) => top < -8);
    if (at >= 0) shown[at].scrollIntoView();
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("input:not([type=checkbox]), select")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const keys = { "/": () => $("search").focus(), n: () => step(1), p: () => step(-1) };
    if (!Object.hasOwn(keys, event.key)) return;
    event.preventDefault();
    keys[event.key]();
  });
  for (const id of ["search", "choose-label", "choose-prediction", "wrong"]) {
    $(id).addEventListener("input", filter);
  }
  $("filters").hidden = false;
})();
