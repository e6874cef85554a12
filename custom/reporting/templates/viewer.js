"use strict";
(() => {
  const root = document.documentElement;
  const layers = ["mask", "lungs"];
  const data = JSON.parse(document.getElementById("pictures").textContent);
  const viewer = document.querySelector(".viewer");
  const slices = data ? data.slices : [];  // from the head down
  let at = 0;

  const uri = (code) => `data:image/${code.startsWith("iVBOR") ? "png" : "webp"};base64,${code}`;

  function place(image, code) {
    image.hidden = !code;
    if (code) image.src = uri(code);
  }

  function setLayer(name, on) {
    root.dataset[name] = on ? "on" : "off";
    for (const button of document.querySelectorAll(`button[data-layer="${name}"]`)) {
      button.setAttribute("aria-pressed", String(on));
    }
    remember();
  }

  const isOn = (name) => root.dataset[name] !== "off";

  function show(position) {
    if (!viewer) return;
    at = Math.min(Math.max(position, 0), slices.length - 1);
    const slice = slices[at];
    place(viewer.querySelector(".scan"), slice.image);
    place(viewer.querySelector(".lungs"), slice.lungs);
    place(viewer.querySelector(".mask"), slice.opacity);
    const ml = slice.ml;
    const found = ml === 0 ? "no opacity" : `${ml < 0.05 ? "< 0.1" : ml.toFixed(1)} mL opacity`;
    viewer.querySelector(".where").textContent = `slice ${slice.number} of ${data.total}\n${found}`;
    const strip = viewer.querySelector(".strip");
    strip.querySelector(".cursor").style.top = `${(100 * (at + 0.5)) / slices.length}%`;
    strip.setAttribute("aria-valuenow", String(slices.length - 1 - at));
    strip.setAttribute("aria-valuetext", `slice ${slice.number} of ${data.total}, ${found}`);
    viewer.dataset.slice = slice.number;
    remember();
  }

  function nearest(number) {
    let best = 0;
    slices.forEach((slice, n) => {
      if (Math.abs(slice.number - number) < Math.abs(slices[best].number - number)) best = n;
    });
    return best;
  }

  // The address tells what is shown, so that it can be noted or sent: page.html#slice=87&mask=off
  let timer = 0;
  function remember() {
    clearTimeout(timer);
    timer = setTimeout(() => {
      const parts = viewer ? [`slice=${slices[at].number}`] : [];
      for (const name of layers) if (!isOn(name)) parts.push(`${name}=off`);
      const hash = parts.join("&");
      if (location.hash.slice(1) !== hash && (hash || location.hash)) history.replaceState(null, "", `#${hash}`);
    }, 400);
  }

  function recall() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    for (const name of layers) if (wanted.has(name)) setLayer(name, wanted.get(name) !== "off");
    const number = Number(wanted.get("slice"));
    if (!viewer || !wanted.has("slice") || !Number.isFinite(number)) return false;
    show(nearest(number));
    return true;
  }

  for (const button of document.querySelectorAll("button[data-layer]")) {
    button.addEventListener("click", () => setLayer(button.dataset.layer, !isOn(button.dataset.layer)));
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.toLowerCase();
    if (key === "m") setLayer("mask", !isOn("mask"));
    else if (key === "l") setLayer("lungs", !isOn("lungs"));
    else if (viewer) {
      // Up, down and the like scroll the page, unless the viewer has been clicked on.
      const steps = { arrowleft: -1, arrowright: 1 };
      const more = { arrowup: -1, arrowdown: 1, pageup: -10, pagedown: 10, home: -slices.length, end: slices.length };
      const inside = viewer.contains(document.activeElement);
      const step = steps[key] ?? (inside ? more[key] : undefined);
      if (step === undefined) return;
      event.preventDefault();
      show(at + step);
    }
  });

  if (viewer) {
    const levels = data.levels.opacity_ml;
    for (const slice of slices) {
      const n = slice.number - 1;
      slice.ml = levels.left[n] + levels.right[n] + levels.outside_lungs[n];
    }
    const stage = viewer.querySelector(".stage");
    const strip = viewer.querySelector(".strip");
    let turned = 0;
    stage.addEventListener("wheel", (event) => {
      if (event.ctrlKey) return;
      const before = at;
      turned += event.deltaMode === 1 ? event.deltaY * 30 : event.deltaY;
      const step = Math.trunc(turned / 30);
      if (step) {
        turned -= step * 30;
        show(at + Math.sign(step) * Math.min(Math.abs(step), 4));
      }
      // At either end the page scrolls on.
      if (at !== before || (at > 0 && at < slices.length - 1)) event.preventDefault();
    }, { passive: false });

    const follow = (event) => {
      const box = strip.getBoundingClientRect();
      show(Math.floor((slices.length * (event.clientY - box.top)) / box.height));
    };
    strip.addEventListener("pointerdown", (event) => {
      strip.setPointerCapture(event.pointerId);
      follow(event);
    });
    strip.addEventListener("pointermove", (event) => {
      if (strip.hasPointerCapture(event.pointerId)) follow(event);
    });

    let dragged = null;
    stage.addEventListener("pointerdown", (event) => {
      dragged = { y: event.clientY, at };
      stage.setPointerCapture(event.pointerId);
      stage.focus({ preventScroll: true });
    });
    stage.addEventListener("pointermove", (event) => {
      if (!stage.hasPointerCapture(event.pointerId) || !dragged) return;
      const height = Math.max(stage.clientHeight / slices.length, 4);
      const wanted = dragged.at + Math.round((event.clientY - dragged.y) / height);
      if (wanted !== at) show(wanted);
    });

    const sheet = document.querySelector(".sheet");
    const count = Math.min(12, slices.length);
    for (let n = 0; n < count; n += 1) {
      const slice = slices[Math.round(((n + 0.5) * slices.length) / count - 0.5)];
      const figure = document.createElement("figure");
      for (const [kind, code] of [["scan", slice.image], ["lungs", slice.lungs], ["mask", slice.opacity]]) {
        if (!code) continue;
        const image = new Image();
        image.className = kind;
        image.alt = "";
        image.src = uri(code);
        figure.append(image);
      }
      const caption = document.createElement("figcaption");
      caption.textContent = `slice ${slice.number}`;
      figure.append(caption);
      sheet.append(figure);
    }

    const start = nearest(data.start);
    document.querySelector("[data-go]")?.addEventListener("click", () => show(start));
    if (!recall()) show(start);
  } else {
    recall();
  }
  window.addEventListener("hashchange", () => {
    if (recall()) viewer.scrollIntoView({ block: "nearest" });
  });
})();
