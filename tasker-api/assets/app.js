// What a browser adds to pages that can be read without it: live changes, copying, the theme,
// and a timeline of any length. No library; nothing is built.
"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const base = document.body.dataset.base || "";
  root.classList.add("js");

  // Words. The rules are those of the server.
  const skew = Number(document.body.dataset.now || Date.now()) - Date.now();
  const relative = (at) => {
    const s = Math.trunc((Date.now() + skew - at) / 1000), n = Math.abs(s);
    if (n <= 1) return "just now";
    const [k, unit] = n < 90 ? [n, "s"] : n < 5400 ? [Math.floor((n + 30) / 60), "min"]
      : n < 129600 ? [Math.floor((n + 1800) / 3600), "h"] : [Math.floor((n + 43200) / 86400), "d"];
    return s < 0 ? `in ${k} ${unit}` : `${k} ${unit} ago`;
  };
  const three = (x) => String(Number(x.toPrecision(3)));
  const duration = (us) => {
    const s = Math.floor(us / 1e6);
    if (us < 1e3) return `${us} µs`;
    if (us < 1e6) return `${three(us / 1e3)} ms`;
    if (s < 60) return `${three(us / 1e6)} s`;
    const two = (a, x, b, y) => (b ? `${a} ${x} ${b} ${y}` : `${a} ${x}`);
    if (s < 3600) return two(Math.floor(s / 60), "min", s % 60, "s");
    if (s < 86400) return two(Math.floor(s / 3600), "h", Math.floor((s % 3600) / 60), "min");
    return two(Math.floor(s / 86400), "d", Math.floor((s % 86400) / 3600), "h");
  };
  const tick = () => all("time[datetime]:not([data-keep])").forEach((time) => {
    const text = relative(Date.parse(time.dateTime));
    if (time.textContent !== text) time.textContent = text;
  });
  setInterval(tick, 1000);

  const toast = (text) => {
    all(".toast").forEach((old) => old.remove());
    const box = document.createElement("div");
    box.className = "toast";
    box.setAttribute("role", "status");
    box.textContent = text;
    document.body.append(box);
    setTimeout(() => box.remove(), 1800);
  };

  // Clicks: copying, the theme, picking rows, the size of the graph.
  const copy = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    toast("Copied");
  };
  const remember = (name, value) => {
    document.cookie = `${name}=${value}; path=${base || "/"}; max-age=31536000; samesite=strict`;
  };
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button, input[type=checkbox]");
    for (const menu of all("details.menu[open]")) if (!menu.contains(event.target)) menu.open = false;
    if (!button) return;
    if (button.dataset.copy !== undefined) copy(button.dataset.copy);
    if (button.dataset.copyFrom) copy(document.getElementById(button.dataset.copyFrom)?.textContent ?? "");
    if (button.dataset.theme !== undefined) {
      root.dataset.theme = dark() ? "light" : "dark";
      remember("tasker_theme", root.dataset.theme);
    }
    if (button.dataset.back !== undefined) history.back();
    if (button.dataset.live !== undefined) pause(!paused);
    if (button.dataset.fit !== undefined) {
      const graph = document.querySelector(".graph");
      button.textContent = graph?.classList.toggle("fit") ? "Actual size" : "Fit to width";
    }
    if (button.id === "pick-all") all("input[name=task]").forEach((box) => { box.checked = button.checked; });
    if (button.type === "checkbox") picked();
  });
  const picked = () => {
    const bar = document.querySelector(".pick");
    if (!bar) return;
    const n = all("input[name=task]:checked").length;
    bar.classList.toggle("idle", n === 0);
    const said = bar.querySelector("[data-picked]");
    if (said) said.textContent = `${n} selected`;
  };

  // On a phone the navigation is wider than the screen: show where we are in it.
  const here = document.querySelector(".nav [aria-current]");
  if (here) here.parentElement.scrollLeft = here.offsetLeft - here.parentElement.offsetLeft - 40;

  // Keys.
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, textarea, select");
    if (event.key === "Escape") {
      all("details.menu[open]").forEach((menu) => { menu.open = false; menu.querySelector("summary")?.focus(); });
      if (typing) typing.blur();
      return;
    }
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") {
      event.preventDefault();
      const box = document.getElementById("search");
      box?.focus();
      box?.select();
    } else if (event.key === "p") {
      pause(!paused);
    } else if (event.key === "j" || event.key === "k") {
      const links = all("[data-row]");
      const at = links.indexOf(document.activeElement);
      links[Math.max(0, Math.min(links.length - 1, at + (event.key === "j" ? 1 : -1)))]?.focus();
    }
  });

  // Live changes: an event says that something changed, and the parts marked data-live are read
  // again, at most once in the time that the server asks for. Nodes that did not change are left alone.
  const morph = (old, fresh) => {
    if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName) return old.replaceWith(fresh);
    if (old.nodeType !== 1) {
      if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
      return;
    }
    if (old.isEqualNode(fresh)) return;
    const kept = (name) => old.matches("[data-keep]") || (name === "open" && old.nodeName === "DETAILS") || (name === "class" && old.matches(".pick, .graph"));
    for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name) && !kept(name)) old.removeAttribute(name);
    for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value && !kept(name)) old.setAttribute(name, value);
    if (old.matches("input, textarea, select, [data-keep]")) return;
    const keyed = new Map([...old.children].filter((child) => child.dataset?.key).map((child) => [child.dataset.key, child]));
    let next = old.firstChild;
    for (const child of [...fresh.childNodes]) {
      const same = keyed.get(child.dataset?.key);
      if (same) {
        keyed.delete(child.dataset.key);
        if (same === next) next = next.nextSibling;
        else old.insertBefore(same, next);
        morph(same, child);
      } else if (next && !next.dataset?.key && !child.dataset?.key) {
        const after = next.nextSibling;
        morph(next, child);
        next = after;
      } else {
        old.insertBefore(child, next);
      }
    }
    while (next) { const after = next.nextSibling; next.remove(); next = after; }
    keyed.forEach((left) => left.remove());
  };

  const live = document.querySelector("button[data-live]");
  let paused = sessionStorage.getItem("tasker-paused") === "yes", dirty = false, reading = false, tag = "", last = 0;
  // While many watch, the server asks for fewer looks.
  let every = 1000, again = 1800;
  const pace = (body) => { every = Number(body.dataset.every || 1000); again = Number(body.dataset.again || 1800); };
  pace(document.body);
  const show = (state) => {
    if (!live) return;
    live.dataset.state = state;
    live.textContent = { live: "Live", paused: "Paused", lost: "Reconnecting", off: "Connecting" }[state];
    live.setAttribute("aria-pressed", String(state === "paused"));
  };
  const pause = (to) => {
    if (!live) return;
    paused = to;
    sessionStorage.setItem("tasker-paused", to ? "yes" : "no");
    show(to ? "paused" : "live");
    if (!to) refresh();
  };
  const refresh = async () => {
    dirty = true;
    if (reading || paused || document.hidden) return;
    reading = true;
    while (dirty && !paused && !document.hidden) {
      const rest = last + every - Date.now();
      if (rest > 0) await new Promise((done) => setTimeout(done, rest));
      dirty = false;
      last = Date.now();
      try {
        const answer = await fetch(location.href, { headers: tag ? { "If-None-Match": tag } : {}, redirect: "manual", cache: "no-store" });
        if (answer.ok) {
          tag = answer.headers.get("ETag") || "";
          const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
          for (const part of all("[data-live-part]")) {
            const newer = fresh.getElementById(part.id);
            if (newer) morph(part, newer);
          }
          if (fresh.title) document.title = fresh.title;
          pace(fresh.body);
          tick();
          picked();
          timelines.forEach((one) => one.load());
        } else if (answer.type === "opaqueredirect" || answer.status === 401) {
          location.reload();
          return;
        }
      } catch {
        show("lost");
      }
    }
    reading = false;
  };
  if (live && document.body.dataset.events && window.EventSource) {
    show(paused ? "paused" : "off");
    let events, later;
    // The server may answer with what it read a moment before the event: look once more after that.
    const changed = () => {
      refresh();
      clearTimeout(later);
      later = setTimeout(refresh, again);
    };
    const listen = () => {
      events = new EventSource(document.body.dataset.events);
      events.onopen = () => { if (!paused) show("live"); };
      events.onerror = () => { if (!paused) show("lost"); if (events.readyState === 2) setTimeout(listen, 5000); };
      for (const name of ["task", "many"]) events.addEventListener(name, changed);
    };
    listen();
    document.addEventListener("visibilitychange", () => { if (dirty) refresh(); });
    addEventListener("pagehide", () => events.close());
    // Without events the page looks by itself, and always where what it shows raises none.
    const poll = Number(document.querySelector("[data-poll]")?.dataset.poll || 0);
    if (poll) setInterval(refresh, poll);
    setInterval(() => { if (live.dataset.state === "lost") refresh(); }, 3000);
    // What was just asked for may have happened before the events began.
    if (/[?&]done=/.test(location.search)) for (const wait of [600, 2000]) setTimeout(refresh, wait);
  }

  // Timeline: only the rows in view exist. The zoom is a window on the common axis.
  const svg = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) element.setAttribute(key, attributes[key]);
    return element;
  };
  const words = { task: "the task", run: "running", fail: "failed attempt", queue: "in the queue", held: "held back",
    retry: "waiting to retry", wait: "waiting", settle: "result on its way" };
  const ROW = 24;
  class Timeline {
    constructor(box) {
      this.box = box;
      this.from = 0;
      this.to = 1;
      this.view = document.createElement("div");
      this.view.className = "tl-view";
      this.rows = document.createElement("div");
      this.rows.className = "tl-rows";
      this.view.append(this.rows);
      this.view.addEventListener("scroll", () => this.draw(), { passive: true });
      box.addEventListener("keydown", (event) => this.key(event));
      box.addEventListener("wheel", (event) => {
        if (!event.ctrlKey) return;
        event.preventDefault();
        this.zoom(event.deltaY > 0 ? 1.25 : 0.8, this.at(event));
      }, { passive: false });
      box.addEventListener("pointermove", (event) => this.tip(event));
      box.addEventListener("pointerleave", () => this.tip());
      all("[data-zoom]").forEach((button) => button.addEventListener("click", () => this.command(button.dataset.zoom)));
      this.load();
    }
    // What takes long to make is asked for less often.
    async load() {
      if (this.loading || this.later) return;
      const rest = (this.next || 0) - Date.now();
      if (rest > 0) {
        this.later = setTimeout(() => { this.later = 0; this.load(); }, rest);
        return;
      }
      this.loading = true;
      const began = Date.now();
      try {
        await this.read();
      } catch {
        // The page says that the server is gone; the next change asks again.
      }
      this.loading = false;
      this.next = Date.now() + 4 * (Date.now() - began);
    }
    async read() {
      const answer = await fetch(this.box.dataset.source, { headers: this.tag ? { "If-None-Match": this.tag } : {} });
      if (!answer.ok) return;
      this.tag = answer.headers.get("ETag");
      this.data = await answer.json();
      if (!this.view.isConnected) {
        const axis = document.createElement("div");
        axis.className = "tl-axis";
        axis.setAttribute("aria-hidden", "true");
        this.axis = axis;
        this.box.replaceChildren(axis, this.view);
      }
      this.draw(true);
    }
    place(us) {
      const knots = this.data.knots;
      let low = 0, high = knots.length - 1;
      while (high - low > 1) { const mid = (low + high) >> 1; if (knots[mid][0] <= us) low = mid; else high = mid; }
      const [t0, x0] = knots[low], [t1, x1] = knots[high];
      return t1 === t0 ? x0 : x0 + (x1 - x0) * Math.max(0, Math.min(1, (us - t0) / (t1 - t0)));
    }
    time(x) {
      const knots = this.data.knots;
      for (let k = 1; k < knots.length; k++) {
        const [t0, x0] = knots[k - 1], [t1, x1] = knots[k];
        if (x <= x1) return x1 === x0 ? t1 : Math.round(t0 + (t1 - t0) * (x - x0) / (x1 - x0));
      }
      return this.data.length_us;
    }
    x(us) { return (this.place(us) - this.from) / (this.to - this.from) * 1000; }
    at(event) {
      const bars = this.box.querySelector(".tl-bars").getBoundingClientRect();
      return Math.max(0, Math.min(1, (event.clientX - bars.left) / bars.width));
    }
    zoom(factor, at = 0.5) {
      const width = Math.min(1, Math.max(1e-5, (this.to - this.from) * factor));
      const middle = this.from + (this.to - this.from) * at;
      this.from = Math.max(0, Math.min(1 - width, middle - width * at));
      this.to = this.from + width;
      this.draw(true);
    }
    move(share) {
      const width = this.to - this.from;
      this.from = Math.max(0, Math.min(1 - width, this.from + width * share));
      this.to = this.from + width;
      this.draw(true);
    }
    command(word) {
      if (word === "in") this.zoom(0.6);
      if (word === "out") this.zoom(1 / 0.6);
      if (word === "all") { this.from = 0; this.to = 1; this.draw(true); }
      if (word === "left") this.move(-0.3);
      if (word === "right") this.move(0.3);
    }
    key(event) {
      const word = { "+": "in", "=": "in", "-": "out", 0: "all", ArrowLeft: "left", ArrowRight: "right" }[event.key];
      if (!word || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      this.command(word);
    }
    tip(event) {
      const bar = event?.target.closest?.("rect[data-said]");
      if (!bar) { this.bubble?.remove(); this.bubble = undefined; return; }
      if (!this.bubble) {
        this.bubble = document.createElement("div");
        this.bubble.className = "tl-tip";
        document.body.append(this.bubble);
      }
      this.bubble.textContent = bar.dataset.said;
      this.bubble.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - this.bubble.offsetWidth - 8))}px`;
      this.bubble.style.top = `${event.clientY + 16}px`;
    }
    said(bar) {
      return `${bar.attempt ? `attempt ${bar.attempt}: ` : ""}${words[bar.kind]} ${duration(bar.to - bar.from)}${bar.open ? " so far" : ""}${bar.note ? `, ${bar.note}` : ""}`;
    }
    breaks() {
      return this.data.gaps.map(([from, to]) => {
        const x = this.x(from);
        return svg("rect", { class: "b-gap", x: x.toFixed(2), y: 0, width: Math.max(2, this.x(to) - x).toFixed(2), height: 16,
          "data-said": `nothing ran for ${duration(to - from)}; shortened` });
      });
    }
    bars(row) {
      const bars = svg("svg", { class: "tl-bars", viewBox: "0 0 1000 16", preserveAspectRatio: "none", role: "img",
        "aria-label": `${row.name}: ${row.bars.slice(0, 12).map((bar) => this.said(bar)).join("; ")}` });
      bars.append(...this.breaks());
      for (const bar of row.bars) {
        const x = Math.max(-10, this.x(bar.from)), end = Math.min(1010, this.x(bar.to));
        if (end < 0 || x > 1000) continue;
        const thin = bar.kind === "settle" || bar.kind === "task";
        bars.append(svg("rect", { class: `b-${bar.kind}${bar.open ? " open" : ""}`, x: x.toFixed(2), y: thin ? 6 : 2,
          width: Math.max(1.5, end - x).toFixed(2), height: thin ? 4 : 12, "data-said": this.said(bar) }));
      }
      return bars;
    }
    row(row, at) {
      const line = document.createElement("div");
      line.className = "tl-row";
      line.style.top = `${at * ROW}px`;
      const name = document.createElement("span");
      name.className = "tl-name";
      name.title = row.name;
      if (row.step) {
        const link = document.createElement("a");
        link.href = this.box.dataset.steps + row.step;
        link.textContent = row.name;
        name.append(link);
      } else {
        name.textContent = row.name;
      }
      const took = document.createElement("span");
      took.className = "tl-took";
      took.textContent = duration(row.took_us);
      line.append(name, this.bars(row), took);
      return line;
    }
    draw(anew) {
      const { rows } = this.data;
      if (anew) {
        this.shown = new Map();
        this.rows.replaceChildren();
        this.rows.style.height = `${rows.length * ROW}px`;
        const scale = svg("svg", { class: "tl-bars tl-scale", viewBox: "0 0 1000 16", preserveAspectRatio: "none" });
        scale.append(...this.breaks());
        const ends = document.createElement("span");
        ends.className = "tl-ends";
        const narrow = this.box.clientWidth < 560;
        for (const share of narrow ? [0, 1] : [0, 0.25, 0.5, 0.75, 1]) {
          const label = document.createElement("span");
          const us = this.time(this.from + (this.to - this.from) * share);
          label.textContent = us === 0 ? "0" : duration(us);
          ends.append(label);
        }
        this.axis.replaceChildren(document.createElement("span"), scale, document.createElement("span"), ends);
      }
      const first = Math.max(0, Math.floor(this.view.scrollTop / ROW) - 10);
      const last = Math.min(rows.length, Math.ceil((this.view.scrollTop + (this.view.clientHeight || 520)) / ROW) + 10);
      for (const [at, line] of this.shown) if (at < first || at >= last) { line.remove(); this.shown.delete(at); }
      for (let at = first; at < last; at++) {
        if (this.shown.has(at)) continue;
        const line = this.row(rows[at], at);
        this.shown.set(at, line);
        this.rows.append(line);
      }
    }
  }
  const timelines = all(".timeline[data-source]").map((box) => new Timeline(box));
  picked();
})();
