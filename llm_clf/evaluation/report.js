"use strict";
// The browser of mistakes. What rows say is set as text, never as HTML.
(() => {
  const block = document.getElementById("data");
  if (!block) return;
  const mistakes = JSON.parse(block.textContent);
  const byId = (id) => document.getElementById(id);
  const PAGE = 50;
  const LENGTH = 240;
  const number = (value) => (value === null ? -1 : value);
  const ORDERS = {
    prob: (a, b) => number(b.prob) - number(a.prob),
    unsure: (a, b) => number(a.prob) - number(b.prob),
    id: (a, b) => a.id.localeCompare(b.id, undefined, { numeric: true }),
    long: (a, b) => b.text.length - a.text.length,
    short: (a, b) => a.text.length - b.text.length,
  };
  let limit = PAGE;

  function element(name, text, kind) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  }

  function body(text) {
    if (text.length <= LENGTH) return element("p", text, "text");
    const details = element("details");
    details.append(element("summary", text.slice(0, LENGTH) + "…", "text"), element("p", text, "text"));
    return details;
  }

  function item(mistake) {
    const made = element("li");
    const head = element("p", undefined, "head");
    head.append(
      element("span", mistake.id, "id"),
      element("span", "gold", "is"),
      element("bdi", mistake.gold, "gold"),
      element("span", "predicted", "is"),
      element("bdi", mistake.predicted || "(none)", "predicted"),
    );
    if (!mistake.predicted) head.append(element("span", mistake.status, "is"));
    if (mistake.prob !== null) {
      const meter = element("meter");
      meter.value = mistake.prob;
      head.append(meter, element("span", mistake.prob.toFixed(4), "prob"));
    }
    made.append(head);
    if (mistake.answer) made.append(element("p", "answered: " + mistake.answer, "text answer"));
    if (mistake.text) made.append(body(mistake.text));
    return made;
  }

  function show() {
    const gold = byId("gold").value;
    const predicted = byId("predicted").value;
    const sought = byId("search").value.toLowerCase();
    const found = mistakes
      .filter((one) => !gold || gold === "=" + one.gold)
      .filter((one) => !predicted || predicted === "=" + one.predicted)
      .filter((one) => !sought || [one.id, one.text, one.answer].some((text) => text.toLowerCase().includes(sought)))
      .sort(ORDERS[byId("sort").value]);
    byId("count").textContent = found.length + (found.length === 1 ? " row" : " rows");
    byId("mistakes").replaceChildren(...found.slice(0, limit).map(item));
    byId("more").hidden = found.length <= limit;
  }

  byId("controls").hidden = false;
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("controls").addEventListener("input", () => {
    limit = PAGE;
    show();
  });
  byId("more").addEventListener("click", () => {
    limit += PAGE;
    show();
  });
  show();
})();
