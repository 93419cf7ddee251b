"use strict";
// Everything that came from a file is put into text nodes, never into markup.
(() => {
  const PAGE = 20;
  const SETS = JSON.parse(document.getElementById("sample-sets").textContent);
  const browser = document.getElementById("browser");

  const make = (tag, given = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(given)) {
      if (name === "text") element.textContent = value;
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children);
    return element;
  };

  // ---- theme, copying, reloading ------------------------------------------------------------------------------------

  const THEMES = { auto: "as the system", dark: "dark", light: "light" };
  const remembered = () => {
    try { return localStorage.getItem("helpsteer-rloo-theme"); } catch { return null; }
  };
  const themeButton = document.getElementById("theme");
  const setTheme = (name) => {
    const theme = name in THEMES ? name : "auto";
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    themeButton.textContent = `Theme: ${THEMES[theme]}`;
    themeButton.dataset.theme = theme;
    try { localStorage.setItem("helpsteer-rloo-theme", theme); } catch { /* a page may have no storage */ }
  };
  themeButton.addEventListener("click", () => {
    const names = Object.keys(THEMES);
    setTheme(names[(names.indexOf(themeButton.dataset.theme) + 1) % names.length]);
  });
  setTheme(remembered());
  themeButton.hidden = false;

  for (const button of document.querySelectorAll("button.copy")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const code = document.getElementById(button.dataset.copies);
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        button.textContent = "Selected";
      }
    });
  }

  const pause = document.getElementById("pause");
  if (pause) {
    let timer = null;
    const start = () => { timer = setTimeout(() => location.reload(), 1000 * Number(pause.dataset.seconds)); };
    pause.addEventListener("click", () => {
      if (timer === null) start();
      else { clearTimeout(timer); timer = null; }
      pause.textContent = timer === null ? "Reload every minute" : "Stop reloading";
    });
    start();
    pause.hidden = false;
  }

  // ---- state, which is the fragment of the address ------------------------------------------------------------------

  if (!SETS.length) {
    browser.append(make("p", { text: "There are no samples yet." }));
    return;
  }
  const START = { set: SETS[0].id, q: "", domain: "", by: "", sort: "difference", down: false, page: 0, open: null };
  let state = { ...START };

  const setOf = (id) => SETS.find((one) => one.id === id) || SETS[0];
  const scoresOf = (set) => {
    if (!set.names) set.names = [...new Set(set.samples.flatMap((one) => Object.keys(one.sides[0].scores)))];
    return set.names;
  };
  const domainsOf = (set) => {
    if (!set.domains) set.domains = [...new Set(set.samples.map((one) => one.domain).filter(Boolean))].sort();
    return set.domains;
  };
  const haystack = (sample) => {
    if (sample.hay === undefined) {
      const texts = [...sample.prompt.map((turn) => turn[1]), ...sample.sides.map((side) => side.text)];
      sample.hay = texts.join("\n").toLowerCase();
    }
    return sample.hay;
  };

  const toFragment = () => {
    const given = new URLSearchParams();
    for (const name of ["set", "q", "domain", "by", "sort"]) if (state[name] !== START[name]) given.set(name, state[name]);
    if (state.down) given.set("down", "1");
    if (state.page) given.set("page", String(state.page + 1));
    const rest = given.toString();
    return `#${state.open === null ? "samples" : `sample-${state.open}`}${rest ? `&${rest}` : ""}`;
  };

  const fromFragment = () => {
    const [place, ...rest] = location.hash.slice(1).split("&");
    const opened = /^sample-(\d+)$/.exec(place);
    if (!opened && place !== "samples") return false;
    const given = new URLSearchParams(rest.join("&"));
    const set = setOf(given.get("set"));
    state = {
      ...START,
      set: set.id,
      q: given.get("q") || "",
      domain: domainsOf(set).includes(given.get("domain")) ? given.get("domain") : "",
      by: scoresOf(set).includes(given.get("by")) ? given.get("by") : "",
      sort: ["number", "first", "second", "difference"].includes(given.get("sort")) ? given.get("sort") : START.sort,
      down: given.get("down") === "1",
      page: Math.max(0, (Number.parseInt(given.get("page"), 10) || 1) - 1),
      open: opened ? Number(opened[1]) : null,
    };
    return true;
  };

  // ---- what is shown ------------------------------------------------------------------------------------------------

  const scoreName = () => state.by || scoresOf(setOf(state.set))[0] || "";
  const valuesOf = (sample) => {
    const [first, second] = sample.sides.map((side) => side.scores[scoreName()]);
    return { number: sample.n, first, second, difference: second - first };
  };
  const chosen = () => {
    const wanted = state.q.toLowerCase();
    const found = setOf(state.set).samples.filter(
      (one) => (!state.domain || one.domain === state.domain) && (!wanted || haystack(one).includes(wanted)),
    );
    const sign = state.down ? -1 : 1;
    const rank = (value) => (Number.isFinite(value) ? value * sign : Infinity); // what has no score comes last
    return found
      .map((one) => ({ one, key: rank(valuesOf(one)[state.sort]) }))
      .sort((a, b) => (a.key < b.key ? -1 : a.key > b.key ? 1 : 0))
      .map((entry) => entry.one);
  };
  const rounded = (value) => Math.round(value * 1000) / 1000 || 0; // and no zero with a sign
  const direction = (value) => (rounded(value) > 0 ? "up" : rounded(value) < 0 ? "down" : "");
  const signs = { up: "+", down: "−", "": "" };
  const signed = (value) => (Number.isFinite(value) ? signs[direction(value)] + Math.abs(rounded(value)).toFixed(3) : "–");
  const shown = (value) => signed(value).replace("+", "");

  const labelled = (text, control) =>
    make("div", { class: "filter" }, make("label", { for: control.id, text }), control);
  const select = (id, label, options, value, changed) => {
    const box = make("select", { id, onchange: (event) => changed(event.target.value) });
    for (const [name, text] of options) box.append(make("option", { value: name, text, selected: name === value }));
    return labelled(label, box);
  };

  const search = make("input", { type: "search", id: "search", autocomplete: "off", spellcheck: "false" });
  search.addEventListener("input", () => change({ q: search.value, page: 0 }));
  const filters = make("div", { class: "filters" });
  const count = make("p", { class: "found", role: "status" });
  const list = make("div");
  const pager = make("div", { class: "pager" });
  const detail = make("div");
  browser.append(filters, count, detail, list, pager);

  const renderFilters = () => {
    const set = setOf(state.set);
    const parts = [];
    if (SETS.length > 1) {
      parts.push(select("show", "Show", SETS.map((one) => [one.id, one.title]), set.id, (id) => change({ ...START, set: id })));
    }
    parts.push(labelled("Search in prompts and responses", search));
    if (domainsOf(set).length) {
      const options = [["", "all domains"], ...domainsOf(set).map((name) => [name, name])];
      parts.push(select("domain", "Domain", options, state.domain, (domain) => change({ domain, page: 0 })));
    }
    if (scoresOf(set).length > 1) {
      const names = scoresOf(set).map((name) => [name, name]);
      parts.push(select("score", "Score", names, scoreName(), (by) => change({ by, page: 0 })));
    }
    const focused = document.activeElement && filters.contains(document.activeElement) && document.activeElement.id;
    filters.replaceChildren(...parts);
    if (focused) document.getElementById(focused).focus();
    if (search.value !== state.q) search.value = state.q;
  };

  const heading = (name, text, kind) => {
    const active = state.sort === name;
    const arrow = active ? (state.down ? " ↓" : " ↑") : "";
    const button = make("button", {
      type: "button",
      text: text + arrow,
      "data-sort": name,
      onclick: () => change({ sort: name, down: active ? !state.down : name !== "number", page: 0 }),
    });
    return make("th", { scope: "col", class: kind, "aria-sort": active ? (state.down ? "descending" : "ascending") : "none" }, button);
  };

  const excerpt = (sample) => {
    const last = sample.prompt.length ? sample.prompt[sample.prompt.length - 1][1] : "";
    return last.slice(0, 200).replace(/\s+/g, " ");
  };

  const renderList = (found) => {
    const focused = document.activeElement && document.activeElement.dataset.sort;
    const [first, second] = setOf(state.set).sides;
    const withDomain = domainsOf(setOf(state.set)).length > 0;
    const head = make(
      "tr", {},
      heading("number", "No.", "number"),
      make("th", { scope: "col", text: "prompt" }),
      ...(withDomain ? [make("th", { scope: "col", class: "domain", text: "domain" })] : []),
      heading("first", first, "score of-side"),
      heading("second", second, "score of-side"),
      heading("difference", "difference", "score"),
    );
    const body = make("tbody");
    for (const sample of found.slice(state.page * PAGE, (state.page + 1) * PAGE)) {
      const values = valuesOf(sample);
      const link = make("a", {
        href: `#sample-${sample.n}`,
        text: String(sample.n),
        "aria-label": `Open sample ${sample.n}`,
        onclick: (event) => { event.preventDefault(); open(sample.n); },
      });
      body.append(make(
        "tr", { class: sample.n === state.open ? "open" : null },
        make("td", { class: "number" }, link),
        make("td", { class: "text", dir: "auto", text: excerpt(sample) }),
        ...(withDomain ? [make("td", { class: "domain", text: sample.domain })] : []),
        make("td", { class: "score of-side", text: shown(values.first) }),
        make("td", { class: "score of-side", text: shown(values.second) }),
        make("td", { class: `score ${direction(values.difference)}`, text: signed(values.difference) }),
      ));
    }
    list.replaceChildren(make("table", { class: "list" }, make("caption", { class: "unseen", text: "Samples" }), make("thead", {}, head), body));
    if (focused) list.querySelector(`[data-sort="${focused}"]`).focus();
  };

  const renderPager = (total) => {
    const pages = Math.max(1, Math.ceil(total / PAGE));
    const focused = document.activeElement && document.activeElement.dataset.turn;
    const turn = (name, text, page, possible) =>
      make("button", { type: "button", text, "data-turn": name, disabled: !possible, onclick: () => change({ page }) });
    pager.replaceChildren(
      turn("back", "Previous page", state.page - 1, state.page > 0),
      make("span", { text: `page ${state.page + 1} of ${pages}` }),
      turn("on", "Next page", state.page + 1, state.page + 1 < pages),
    );
    const again = focused && pager.querySelector(`[data-turn="${focused}"]:not(:disabled)`);
    if (again) again.focus();
  };

  const said = (text, label) => make("div", { class: "said", dir: "auto", tabindex: "0", role: "group", "aria-label": label, text });

  const renderDetail = (found) => {
    const set = setOf(state.set);
    const sample = set.samples.find((one) => one.n === state.open);
    if (!sample) {
      detail.replaceChildren(...(state.open === null ? [] : [make("p", { text: `There is no sample ${state.open} here.` })]));
      return;
    }
    const place = found.indexOf(sample);
    const step = (text, at) => make("button", {
      type: "button", text, disabled: place < 0 || !found[at], onclick: () => open(found[at].n),
    });
    const turns = sample.prompt.map(([role, content]) =>
      make("div", { class: "turn" }, make("div", { class: "role", text: role }), said(content, role)));
    const sides = sample.sides.map((side, number) => make(
      "div", {},
      make("div", { class: "role", text: set.sides[number] + (side.note ? ` – ${side.note}` : "") }),
      said(side.text, set.sides[number]),
    ));
    const names = scoresOf(set).filter((name) => sample.sides.every((side) => name in side.scores));
    const rows = names.map((name) => {
      const [first, second] = sample.sides.map((side) => side.scores[name]);
      return make(
        "tr", {},
        make("th", { scope: "row", text: name }),
        make("td", { text: shown(first) }),
        make("td", { text: shown(second) }),
        make("td", { class: direction(second - first), text: signed(second - first) }),
      );
    });
    const top = make("tr", {}, ...["score", ...set.sides, "difference"].map((text) => make("th", { scope: "col", text })));
    const facts = [sample.domain, sample.label].filter(Boolean).join(", ");
    detail.replaceChildren(make(
      "article", { class: "opened", id: `sample-${sample.n}`, "aria-labelledby": "opened-title" },
      make(
        "div", { class: "head" },
        make("h3", { id: "opened-title", tabindex: "-1", text: `Sample ${sample.n}${facts ? ` (${facts})` : ""}` }),
        make("div", { class: "controls" }, step("Previous", place - 1), step("Next", place + 1),
          make("button", { type: "button", text: "Close", onclick: () => close() })),
      ),
      ...turns,
      make("div", { class: "beside" }, ...sides),
      make("table", { class: "scores" }, make("thead", {}, top), make("tbody", {}, ...rows)),
    ));
  };

  const render = () => {
    const found = chosen();
    state.page = Math.min(state.page, Math.max(0, Math.ceil(found.length / PAGE) - 1));
    renderFilters();
    const all = setOf(state.set).samples.length;
    const from = state.page * PAGE;
    const range = found.length ? ` Here: ${from + 1} to ${Math.min(from + PAGE, found.length)}.` : "";
    count.textContent = `${found.length === all ? all : `${found.length} of ${all}`} samples.${range}`;
    renderDetail(found);
    renderList(found);
    renderPager(found.length);
  };

  const change = (changes) => {
    state = { ...state, ...changes };
    render();
    history.replaceState(null, "", toFragment());
  };
  const show = () => {
    const title = document.getElementById("opened-title");
    if (title) title.focus({ preventScroll: true });
    (title ? title.closest("article") : browser).scrollIntoView({ block: "nearest" });
  };
  const open = (number) => {
    state = { ...state, open: number };
    render();
    history.pushState(null, "", toFragment());
    show();
  };
  const close = () => {
    const number = state.open;
    change({ open: null });
    const link = list.querySelector(`a[href="#sample-${number}"]`);
    (link || search).focus();
  };

  const follow = () => {
    if (!fromFragment()) return;
    render();
    if (state.open === null) document.getElementById("samples").scrollIntoView();
    else show();
  };
  addEventListener("hashchange", follow);
  addEventListener("popstate", follow);
  render();
  follow();
})();
