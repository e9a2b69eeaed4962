"use strict";
{
  const every_ms = 2000;
  const text = document.getElementById("text");
  const lost = document.getElementById("lost");
  const shown = {};
  let tag = text.dataset.tag;

  // A part that changed is put in place anew; what somebody had opened, scrolled or focused in it stays so.
  const put = (part, html) => {
    const all = (what) => [...part.querySelectorAll(what)];
    const held = "summary, .scroll";
    const open = all("details").map((one) => one.open);
    const scrolled = all(".scroll").map((one) => one.scrollLeft);
    const focused = all(held).indexOf(document.activeElement);
    part.innerHTML = html;
    all("details").forEach((one, place) => { one.open = open[place] ?? false; });
    all(".scroll").forEach((one, place) => { one.scrollLeft = scrolled[place] ?? 0; });
    if (focused >= 0) {
      all(held)[focused]?.focus({ preventScroll: true });
    }
  };

  const look = async () => {
    try {
      const answer = await fetch("/state", { headers: { "If-None-Match": tag }, cache: "no-store" });
      if (answer.status === 200) {
        const { title, parts } = await answer.json();
        document.title = title;
        for (const part of document.querySelectorAll("[data-part]")) {
          const html = parts[part.dataset.part];
          if (shown[part.dataset.part] !== html) {
            put(part, html);
            shown[part.dataset.part] = html;
          }
        }
        tag = answer.headers.get("ETag");
      }
      lost.hidden = answer.ok || answer.status === 304;
    } catch {
      lost.hidden = false;
    }
    setTimeout(look, every_ms);
  };
  setTimeout(look, every_ms);
}
