// The live half of the page: header, player and history. The form is Gradio's.
//
// An event stream, /events, tells of the jobs that the page names, which are those that it shows; what
// a click asks for goes through the server functions of the gr.HTML parts (`ui.py`). A caller's text reaches the page as text nodes only.
(() => {
  "use strict";

  const PAGE_SIZE = 24;
  const SEARCH_PAUSE = 250; // ms after the last key before a search is asked
  const REFRESH_PAUSE = 400; // ms that changes are gathered before the history is asked again
  const REFRESH_LEAST = 5000; // ms between two such questions, when others ask for one job after another
  const NAME_PAUSE = 50; // ms that the jobs on the page may change before they are named anew
  const RETRY_FIRST = 1000; // ms before the stream is opened again; doubles
  const RETRY_MOST = 5000;
  const SILENCE = 45; // seconds without an event after which the stream counts as dead
  const SYNC_SLACK = 0.08; // seconds by which two videos may differ

  const ENDED = ["COMPLETED", "FAILED", "CANCELLED"];
  const STATUS_NAMES = {
    CREATED: "Waiting",
    PENDING: "Waiting",
    PROCESSING: "Running",
    COMPLETED: "Completed",
    FAILED: "Failed",
    CANCELLED: "Stopped",
  };
  const STAGE_NAMES = {
    starting: "Starting",
    text: "Reading the prompt",
    denoise: "Denoising",
    decode: "Decoding the frames",
    encode: "Writing the video",
  };
  const FILTERS = [
    ["all", "Everything"],
    ["running", "Running"],
    ["waiting", "Waiting"],
    ["held", "Held"],
    ["completed", "Completed"],
    ["failed", "Failed"],
    ["stopped", "Stopped"],
    ["starred", "Starred"],
    ["previews", "Previews"],
    ["enhanced", "Enhanced"],
    ["trash", "Trash"],
  ];

  // Small helpers

  /** An element. Properties are set as such; `data-`, `aria-` and `role` as attributes. */
  function h(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (value === undefined || value === null) continue;
      if (name.includes("-") || name === "role") element.setAttribute(name, value);
      else element[name] = value;
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  const ICONS = {
    star: "M12 3.6l2.6 5.3 5.8.8-4.2 4.1 1 5.8-5.2-2.7-5.2 2.7 1-5.8-4.2-4.1 5.8-.8z",
    sparkle: "M12 3l1.8 5.2L19 10l-5.2 1.8L12 17l-1.8-5.2L5 10l5.2-1.8zM19 16l.8 2.2L22 19l-2.2.8L19 22l-.8-2.2L16 19l2.2-.8z",
    download: "M12 4v11m0 0l-4.5-4.5M12 15l4.5-4.5M5 20h14",
    reuse: "M4 12a8 8 0 0 1 13.7-5.6L20 8.6M20 4v4.6h-4.6M20 12a8 8 0 0 1-13.7 5.6L4 15.4M4 20v-4.6h4.6",
    link: "M10 14a4 4 0 0 0 5.7 0l3-3a4 4 0 0 0-5.7-5.7l-1 1M14 10a4 4 0 0 0-5.7 0l-3 3a4 4 0 0 0 5.7 5.7l1-1",
    trash: "M5 7h14M10 7V4.5h4V7M7 7l.8 12.5h8.4L17 7M10.5 10.5v6M13.5 10.5v6",
    stop: "M7 7h10v10H7z",
    undo: "M9 8L5 12l4 4M5 12h9a5 5 0 0 1 0 10h-2",
    film: "M4 5h16v14H4zM8 5v14M16 5v14M4 9.5h4M4 14.5h4M16 9.5h4M16 14.5h4",
  };

  function icon(name) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    svg.setAttribute("viewBox", "0 0 24 24");
    svg.setAttribute("aria-hidden", "true");
    svg.classList.add("m-icon", `m-icon-${name}`);
    path.setAttribute("d", ICONS[name]);
    svg.append(path);
    return svg;
  }

  /** Set a text only when it differs, so that a selection or a screen reader is left in peace. */
  function setText(element, text) {
    if (element.textContent !== text) element.textContent = text;
  }

  function duration(seconds) {
    if (seconds < 9.95) return `${Math.max(0, seconds).toFixed(1)} s`;
    if (seconds < 59.5) return `${Math.round(seconds)} s`;
    const minutes = Math.floor(Math.round(seconds) / 60);
    if (minutes < 60) return `${minutes} min ${Math.round(seconds) % 60} s`;
    return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  }

  /** Time still to go, coarse enough not to flicker. */
  const remaining = (seconds) => (seconds < 9.5 ? `${Math.max(1, Math.ceil(seconds))} s` : duration(seconds));

  function age(unixSeconds) {
    const seconds = Date.now() / 1000 - unixSeconds;
    if (seconds < 60) return "just now";
    if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
    if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
    return new Date(unixSeconds * 1000).toLocaleDateString();
  }

  const statusName = (job) => (job.held ? "Held" : STATUS_NAMES[job.status]);
  const ended = (job) => ENDED.includes(job.status);
  const plural = (count, one, many) => `${count} ${count === 1 ? one : many}`;
  const kindName = (job) => (job.enhanced ? "Enhanced" : "Preview");
  const fileUrl = (path) => `.${path}`; // relative: the app may live under a prefix

  // State

  const parts = {}; // name → {element, server, trigger, props} of each gr.HTML part
  const live = {
    head: null, // the newest event: its counts and clock
    receivedAt: 0, // ms, as of `performance.now()`
    slots: null,
    slotsAt: 0, // seconds on the server's clock
    jobs: new Map(), // by id: the newest views of the jobs that are named
    connected: null,
  };
  const me = { name: null, admin: false, login: false }; // who looks at the page, once that is known
  const shown = {
    jobId: null, // what ?job= says
    preview: null,
    enhance: null,
    deleted: null, // view of a job that was deleted from the panel and can be undone
    problem: "",
  };

  /** Whether a job is ours to stop and delete. The server decides; this only saves a refusal. */
  const mine = (job) => me.name === null || me.admin || !job.owner || job.owner === me.name;

  function notMine(job) {
    return me.login ? `Only ${job.owner} or an admin can do this` : "Asked for in another browser";
  }

  /** Ask a server function. A refusal, or a server that is away, becomes an Error to be shown. */
  async function ask(name, argument) {
    // Gradio answers with nothing when the server was not reached, or refused.
    const answer = await parts.panel.server[name](argument).catch(() => null);
    if (!answer) throw new Error((await gate.closed()) ? gate.short : "The server did not answer. Try again in a moment.");
    if (answer.error !== undefined) throw Object.assign(new Error(answer.error), { refused: true });
    return answer.ok;
  }

  function announce(text) {
    setText(parts.header.announcer, text);
  }

  /** Run what a button asks for; a failure is shown in the panel. */
  async function attempt(action) {
    try {
      shown.problem = "";
      await action();
    } catch (error) {
      shown.problem = error.message;
    }
    panel.render();
  }

  // A server that refuses every call of this page, as behind a proxy that hides where the page is

  const gate = {
    short: "The server refuses what this page sends. The reason is at the top of the page.",

    /** Whether it does. The reason stays on the page. */
    async closed() {
      const answer = await fetch("./livez", { method: "POST" }).catch(() => null);
      const closed = [403, 421].includes(answer?.status);
      const told = closed ? await answer.json().catch(() => null) : null;
      setText(this.notice, told?.detail ?? "A proxy in front of the server refuses what this page sends.");
      this.notice.hidden = !closed;
      return closed;
    },
  };

  // The event stream

  const stream = {
    source: null,
    hidden: false, // whether nobody saw the page when it was opened
    named: new Set(),
    retry: RETRY_FIRST,
    timer: 0,
    renaming: 0,

    /** The jobs that are shown and may change, or belong to what is in the panel. */
    wanted() {
      const jobs = [shown.preview, shown.enhance].filter((job) => job && job.id !== shown.deleted?.id);
      if (!document.hidden) {
        const cards = [...gallery.cards.values()].map((card) => card.job);
        jobs.push(...cards.filter((job) => !ended(job) && job.deleted_at === null));
      }
      return jobs;
    },

    /** A hidden tab looks now and then at what it waits for, and holds no connection meanwhile: a
     * browser has few of them for one server. */
    follow() {
      clearTimeout(this.timer);
      if (document.hidden && this.wanted().every(ended)) return this.close();
      if (!this.source || this.hidden !== document.hidden) this.open();
    },

    /** Have the server tell of what is on the page by now; jobs that have left it do no harm. */
    name() {
      if (!this.source || this.renaming || this.wanted().every((job) => this.named.has(job.id))) return;
      this.renaming = setTimeout(() => {
        this.renaming = 0;
        if (this.source) this.open();
      }, NAME_PAUSE);
    },

    open() {
      this.close();
      this.hidden = document.hidden;
      const wanted = this.wanted();
      this.named = new Set(wanted.map((job) => job.id));
      live.jobs = new Map([...live.jobs].filter(([jobId]) => this.named.has(jobId)));
      const query = new URLSearchParams({ jobs: [...this.named].join() });
      const pictured = new Set(wanted.filter((job) => !ended(job)).map((job) => job.id));
      if (this.hidden) query.set("hidden", "true");
      else if (pictured.size) query.set("pictures", [...pictured].join());
      const source = new EventSource(`./events?${decodeURIComponent(query)}`);
      source.onmessage = (event) => this.receive(JSON.parse(event.data));
      source.onerror = () => {
        // The server ends the stream of a hidden tab, and the browser comes back when it was told to
        const expected = this.hidden && source.readyState === EventSource.CONNECTING;
        if (source === this.source && !expected) this.lost();
      };
      this.source = source;
    },

    close() {
      this.source?.close();
      this.source = null;
    },

    lost() {
      this.close();
      live.jobs.clear();
      if (live.connected !== false) {
        live.connected = false;
        header.render();
        announce("Connection lost. Trying to reconnect.");
        this.askForLogin();
      }
      this.timer = setTimeout(() => this.follow(), this.retry);
      this.retry = Math.min(this.retry * 2, RETRY_MOST);
    },

    /** A stream cannot tell that one has to log in (again). What is typed stays where it is. */
    async askForLogin() {
      const answer = await fetch("./gradio_api/login_check").catch(() => null);
      live.loggedOut = answer?.status === 401;
      header.render();
    },

    receive(event) {
      live.loggedOut = false;
      const wasAway = live.connected === false;
      Object.assign(live, { head: event, connected: true, receivedAt: performance.now() });
      if (event.slots) Object.assign(live, { slots: event.slots, slotsAt: event.now });
      this.retry = RETRY_FIRST;
      const changed = this.merge(event);
      header.render();
      panel.follow(changed);
      gallery.follow(changed);
      if (wasAway) {
        announce("Connected again.");
        panel.reload();
        gallery.later(REFRESH_PAUSE);
      }
      if (document.hidden) this.follow();
    },

    /** The newest views of the jobs that an event tells of; one that is gone has no other field. */
    merge(event) {
      const changed = new Map();
      const latest = (jobId) => changed.get(jobId) ?? live.jobs.get(jobId);
      for (const job of event.jobs) changed.set(job.id, { ...latest(job.id), ...job });
      for (const [jobId, image] of Object.entries(event.pictures ?? {})) {
        changed.set(jobId, { ...latest(jobId), image });
      }
      for (const [jobId, job] of changed) {
        if (job.status !== "PROCESSING") job.image = null;
        if (job.gone) live.jobs.delete(jobId);
        else live.jobs.set(jobId, job);
      }
      return [...changed.values()];
    },
  };

  /** Seconds since the newest event, to let times run on between two of them. */
  const sinceEvent = () => (performance.now() - live.receivedAt) / 1000;

  /** Seconds on the clock by which the stream tells of times. */
  const serverNow = () => live.head.now + sinceEvent();

  // Header

  const header = {
    mount(part) {
      this.dot = h("span", { className: "m-dot", "aria-hidden": "true" });
      this.slots = h("span", { className: "m-slots", textContent: "Connecting" });
      this.counts = h("span", { className: "m-counts" });
      this.who = h("span", { className: "m-who" });
      this.logout = h("form", { className: "m-logout", method: "post", action: "./logout", hidden: true });
      this.logout.append(this.who, h("button", { className: "m-button", textContent: "Log out" }));
      this.login = h("a", { className: "m-button", href: "./", textContent: "Log in", hidden: true });
      part.announcer = h("p", { className: "m-hidden", role: "status", "aria-live": "polite" });
      gate.notice = h("p", { className: "m-problem m-gate", role: "alert", hidden: true });
      part.element.replaceChildren(
        h(
          "header",
          { className: "m-header" },
          h("h1", { className: "m-brand", textContent: "Mochi" }),
          h("p", { className: "m-status", id: "mochi-status" }, this.dot, this.slots, this.counts),
          this.login,
          this.logout,
        ),
        gate.notice,
        part.announcer,
      );
    },

    render() {
      setText(this.who, me.name ?? "");
      this.logout.hidden = !me.login;
      this.login.hidden = !live.loggedOut;
      if (live.connected === false) {
        this.dot.dataset.state = "lost";
        setText(this.slots, live.loggedOut ? "You are logged out" : "Connection to the server lost, reconnecting");
        setText(this.counts, "");
        return;
      }
      if (!live.head) return;
      const { slots } = live;
      const { pending, processing, held } = live.head;
      this.dot.dataset.state = this.worst(slots);
      setText(this.slots, this.describe(slots));
      const kept = held ? ` · ${held} held` : "";
      setText(this.counts, `${processing} running · ${pending} waiting${kept}`);
    },

    worst(slots) {
      const up = slots.filter((slot) => ["ready", "busy"].includes(slot.state)).length;
      if (up === slots.length) return "ready";
      if (slots.some((slot) => ["broken", "restarting"].includes(slot.state))) return "trouble";
      return "loading";
    },

    describe(slots) {
      const up = slots.filter((slot) => ["ready", "busy"].includes(slot.state));
      const others = slots.filter((slot) => !up.includes(slot));
      const name = (slot) => (slots.length > 1 ? `slot ${slot.slot} ` : "");
      const told = others.map((slot) => name(slot) + this.explain(slot));
      if (up.length) {
        const busy = up.every((slot) => slot.state === "busy");
        const count = slots.length > 1 ? ` ${up.length} of ${slots.length}` : "";
        told.unshift((busy ? "Busy" : "Ready") + count);
      }
      const text = told.join(" · ");
      return text.charAt(0).toUpperCase() + text.slice(1);
    },

    explain(slot) {
      if (slot.state === "loading" || slot.state === "starting") {
        return this.counting(slot.detail) || slot.state;
      }
      const reason = slot.detail ? `: ${slot.detail}` : "";
      const left = slot.retry_at === null ? 0 : slot.retry_at - serverNow();
      const retry = left > 0 ? `, again in ${remaining(left)}` : "";
      return slot.state + reason + retry;
    },

    /** "loading the model, 12 s" goes on counting between two events. */
    counting(detail) {
      return detail.replace(/, (\d+) s$/, (_, seconds) => {
        return `, ${Math.round(Number(seconds) + serverNow() - live.slotsAt)} s`;
      });
    },
  };

  // Panel: the selected job, alone or beside its preview or enhance

  function button(name, label, action, options = {}) {
    const element = h("button", {
      type: "button",
      className: `m-button ${options.className ?? ""}`,
      title: options.title,
      "data-action": name,
    });
    if (options.icon) element.append(icon(options.icon));
    element.append(h("span", { textContent: label }));
    element.disabled = options.disabled ?? false;
    element.onclick = () => action(element);
    return element;
  }

  async function copyLink(jobId, element) {
    const url = new URL(location.href);
    url.searchParams.set("job", jobId);
    const label = element.lastChild;
    try {
      await navigator.clipboard.writeText(url.href);
      setText(label, "Copied");
    } catch {
      window.prompt("The link to this video:", url.href); // no clipboard without https
    }
    setTimeout(() => setText(label, "Copy link"), 2000);
  }

  /** The buttons that make sense for a job in its present state. */
  function actions(job) {
    const list = [];
    const add = (...parameters) => list.push(button(...parameters));
    if (!ended(job)) {
      const label = job.cancel_requested ? "Stopping" : "Stop";
      const stop = () =>
        attempt(async () => {
          const stopping = await ask("cancel_job", job.id);
          panel.take({ ...live.jobs.get(job.id), ...stopping }); // with its picture
        });
      const title = mine(job) ? undefined : notMine(job);
      if (job.held) {
        const again = () => attempt(async () => panel.take(await ask("retry_job", job.id)));
        add("retry", "Try again", again, { icon: "reuse", className: "m-primary", title, disabled: !mine(job) });
      }
      add("stop", label, stop, { icon: "stop", title, disabled: job.cancel_requested || !mine(job) });
      add("link", "Copy link", (element) => copyLink(job.id, element), { icon: "link" });
      return list;
    }
    if (job.status === "COMPLETED") {
      if (!job.enhanced && (!shown.enhance || ["FAILED", "CANCELLED"].includes(shown.enhance.status))) {
        const title = `The same video with ${parts.panel.props.enhance_steps} steps`;
        const options = { icon: "sparkle", className: "m-primary", title };
        add("enhance", "Enhance", () => attempt(() => panel.enhance(job.id)), options);
      }
      const star = () => attempt(async () => panel.take(await ask("star_job", [job.id, !job.starred])));
      const starred = { icon: "star", className: job.starred ? "m-starred" : "" };
      add("star", job.starred ? "Unstar" : "Star", star, starred);
      if (job.video_url) {
        const href = fileUrl(job.video_url) + "?download=true";
        const link = h("a", { className: "m-button", href, download: "", "data-action": "download" });
        link.append(icon("download"), h("span", { textContent: "Download" }));
        list.push(link);
      }
    } else {
      const again = () => attempt(() => panel.retry(job));
      add("retry", "Try again", again, { icon: "reuse", className: "m-primary" });
    }
    const title = "Put its prompt, seed and settings into the form";
    add("reuse", "Use again", () => form.reuse(job), { icon: "reuse", title });
    add("link", "Copy link", (element) => copyLink(job.id, element), { icon: "link" });
    const remove = () => attempt(() => panel.delete(job));
    const whose = mine(job) ? undefined : notMine(job);
    add("delete", "Delete", remove, { icon: "trash", title: whose, disabled: !mine(job) });
    return list;
  }

  function facts(job) {
    // Not the difference of two times: the server's clock may have been set in between.
    const took = Object.values(job.seconds).reduce((sum, seconds) => sum + seconds, 0);
    const list = [
      ["Seed", String(job.seed)],
      ["Steps", String(job.num_inference_steps)],
      ["Guidance", String(job.guidance_scale)],
      ["Size", `${job.width} × ${job.height}`],
      ["Length", `${job.num_frames} frames, ${duration(job.num_frames / job.fps)}`],
    ];
    if (job.status === "COMPLETED" && took > 0) list.push(["Took", duration(took)]);
    if (job.resumed_step > 0) list.push(["Resumed", `after step ${job.resumed_step}`]);
    if (job.schedule !== "linear_quadratic") list.push(["Schedule", job.schedule]);
    if (job.lora) list.push(["LoRA", `${job.lora} × ${job.lora_scale}`]);
    if (job.negative_prompt) list.push(["Without", job.negative_prompt]);
    if (me.login && job.owner) list.push(["By", job.owner]);
    return list;
  }

  /** One job in the panel. The video element lives as long as the tile shows the same video. */
  class Tile {
    constructor(jobId) {
      this.jobId = jobId;
      this.name = h("h3", { className: "m-tile-name" });
      this.status = h("span", { className: "m-badge" });
      this.media = h("div", { className: "m-media" });
      this.bar = h("progress", { className: "m-bar" });
      this.stage = h("span", { className: "m-stage" });
      this.eta = h("span", { className: "m-eta" });
      this.progress = h("div", { className: "m-progress" }, this.bar, this.stage, this.eta);
      this.error = h("p", { className: "m-error", dir: "auto" });
      this.facts = h("dl", { className: "m-facts" });
      this.actions = h("div", { className: "m-actions" });
      this.element = h(
        "article",
        { className: "m-tile" },
        h("div", { className: "m-tile-head" }, this.name, this.status),
        this.media,
        this.progress,
        this.error,
        this.actions,
        this.facts,
      );
      this.element.dataset.job = jobId;
    }

    update(job) {
      this.job = job;
      this.element.setAttribute("aria-label", `${kindName(job)}, ${job.num_inference_steps} steps`);
      setText(this.name, `${kindName(job)} · ${job.num_inference_steps} steps`);
      setText(this.status, statusName(job));
      this.element.dataset.status = job.held ? "held" : job.status.toLowerCase();
      this.status.hidden = job.status === "COMPLETED";
      this.showMedia(job);
      this.showProgress(job);
      this.error.hidden = job.status !== "FAILED" && !(job.status === "PENDING" && (job.held || job.error));
      setText(this.error, this.errorText(job));
      this.once("facts", JSON.stringify(facts(job)), () => this.showFacts(job));
      this.once("actions", this.actionsKey(job), () => this.showActions(job));
    }

    errorText(job) {
      if (job.held) return `Held: ${job.held}`;
      return (job.status === "PENDING" ? "Queued again: " : "") + (job.error ?? "");
    }

    /** Do something only when what it depends on has changed. */
    once(name, key, action) {
      this.keys ??= {};
      if (this.keys[name] === key) return;
      this.keys[name] = key;
      action();
    }

    actionsKey(job) {
      const enhance = job.enhanced ? "" : (shown.enhance?.status ?? "none");
      return [job.status, job.held, job.starred, job.cancel_requested, job.video_url, enhance, me.name].join();
    }

    showActions(job) {
      const focused = this.actions.contains(document.activeElement)
        ? document.activeElement.dataset.action
        : null;
      this.actions.replaceChildren(...actions(job));
      if (focused) this.actions.querySelector(`[data-action="${focused}"]`)?.focus();
    }

    showFacts(job) {
      const pairs = facts(job).map(([name, value]) => {
        const text = h("dd", { textContent: value, dir: "auto" });
        return h("div", {}, h("dt", { textContent: name }), text);
      });
      this.facts.replaceChildren(...pairs);
    }

    showProgress(job) {
      this.progress.hidden = ended(job);
      if (ended(job)) return;
      const denoising = job.status === "PROCESSING" && job.step > 0;
      this.bar.max = job.steps;
      if (denoising) this.bar.value = job.step;
      else this.bar.removeAttribute("value");
      this.bar.hidden = job.status !== "PROCESSING";
      this.bar.setAttribute("aria-label", "Steps done");
      setText(this.stage, this.stageText(job));
      this.tick();
    }

    stageText(job) {
      if (job.waits_for?.startsWith("the disk has ")) return `Waiting for room: ${job.waits_for}`;
      if (job.waits_for) return `Waiting: ${job.waits_for}`;
      if (job.status !== "PROCESSING") {
        if (job.held) return "";
        return job.position ? `Place ${job.position} in the queue` : "Waiting for a slot";
      }
      if (job.cancel_requested) return "Stopping after this step";
      const stage = STAGE_NAMES[job.stage] ?? job.stage ?? "Starting";
      if (job.stage === "denoise") return `${stage} · step ${job.step} of ${job.steps}`;
      const tiled = job.stage === "decode" && job.tiles > 1;
      return tiled ? `${stage} · tile ${job.tile} of ${job.tiles}` : stage;
    }

    tick() {
      const left = this.job.eta_seconds;
      const known = left !== null && left !== undefined && !this.job.cancel_requested;
      const age = this.job.as_of === undefined ? 0 : serverNow() - this.job.as_of;
      setText(this.eta, known ? `about ${remaining(left - age)} left` : "");
    }

    showMedia(job) {
      this.media.style.aspectRatio = `${job.width} / ${job.height}`;
      if (job.video_url) {
        this.once("media", `video ${job.video_url}`, () => this.showVideo(job));
      } else if (job.image && !ended(job)) {
        this.once("media", "image", () => {
          this.image = h("img", { className: "m-live", alt: "The picture so far" });
          this.media.replaceChildren(this.image);
        });
        this.once("image", job.image, () => (this.image.src = job.image));
      } else if (job.status === "COMPLETED" && job.poster_url) {
        this.once("media", `poster ${job.poster_url} ${job.video_missing}`, () => this.showEvicted(job));
      } else {
        const key = ended(job) || job.held ? `none ${job.status}` : "wait";
        this.once("media", key, () => this.showNone(job));
      }
    }

    showVideo(job) {
      const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
      this.video = h("video", {
        src: fileUrl(job.video_url),
        poster: job.poster_url ? fileUrl(job.poster_url) : "",
        controls: true,
        loop: true,
        muted: true,
        playsInline: true,
        autoplay: !still,
        "aria-label": `${kindName(job)} video: ${job.prompt}`,
      });
      this.video.onerror = () => this.media.replaceChildren(note("The video could not be played."));
      this.media.replaceChildren(this.video);
    }

    showEvicted(job) {
      const poster = h("img", { src: fileUrl(job.poster_url), alt: "First picture of the video" });
      const gone = job.video_missing
        ? "The video is gone from the server’s disk."
        : "The video was removed to make room.";
      const text = `${gone} “Use again” makes the same one.`;
      this.media.replaceChildren(poster, h("p", { className: "m-over", textContent: text }));
    }

    showNone(job) {
      const text = { FAILED: "No video: the job failed", CANCELLED: "Stopped before its end" };
      const waiting = h("span", { className: "m-breath", "aria-hidden": "true" });
      if (job.held) this.media.replaceChildren(note("Held until somebody tries it again"));
      else this.media.replaceChildren(ended(job) ? note(text[job.status] ?? "No video") : waiting);
    }
  }

  function note(text) {
    return h("p", { className: "m-note" }, icon("film"), h("span", { textContent: text }));
  }

  /** Let two videos run as one: whatever is done to either is done to both. */
  function playTogether(first, second) {
    const listeners = new AbortController();
    const options = { signal: listeners.signal };
    const follow = (leader, follower) => {
      const align = () => {
        if (Math.abs(leader.currentTime - follower.currentTime) > SYNC_SLACK) {
          follower.currentTime = leader.currentTime;
        }
      };
      leader.addEventListener("play", () => follower.paused && follower.play().catch(() => {}), options);
      leader.addEventListener("pause", () => !follower.paused && follower.pause(), options);
      leader.addEventListener("ratechange", () => (follower.playbackRate = leader.playbackRate), options);
      leader.addEventListener("seeked", () => leader.paused && align(), options);
      return align;
    };
    const align = follow(first, second);
    follow(second, first);
    first.addEventListener("timeupdate", () => !first.paused && !first.seeking && align(), options);
    if (!first.paused) second.play().catch(() => {});
    align();
    return () => listeners.abort();
  }

  const panel = {
    tiles: new Map(),
    paired: "",
    unpair: null,
    leaving: null, // id of a job that is being deleted here
    listed: undefined, // as the gallery's, when what is shown was asked for

    mount(part) {
      this.prompt = h("p", { className: "m-prompt", dir: "auto", id: "mochi-prompt" });
      this.problem = h("p", { className: "m-problem", role: "alert" });
      this.undo = h("div", { className: "m-undo" });
      this.empty = h(
        "div",
        { className: "m-empty" },
        icon("film"),
        h("p", { textContent: "Your video appears here." }),
        h("p", { className: "m-subdued", textContent: "Describe it, press Generate, and watch it form." }),
      );
      this.grid = h("div", { className: "m-tiles" });
      this.element = h(
        "section",
        { className: "m-panel", tabIndex: -1, "aria-label": "Selected video" },
        this.problem,
        this.undo,
        this.prompt,
        this.grid,
        this.empty,
      );
      part.element.replaceChildren(this.element);
    },

    /** Show a job by its id; what is known of it already is shown at once. */
    select(jobId, known = null) {
      Object.assign(shown, { jobId, preview: null, enhance: null, deleted: null, problem: "" });
      if (known) this.take(known);
      const url = new URL(location.href);
      if (jobId) url.searchParams.set("job", jobId);
      else url.searchParams.delete("job");
      history.replaceState(history.state, "", url);
      this.render();
      gallery.markSelected();
      return jobId ? this.reload() : Promise.resolve();
    },

    /** Bring into view, unless most of it is there already. */
    reveal() {
      const { top } = this.element.getBoundingClientRect();
      if (top >= 0 && top < window.innerHeight / 2) return;
      const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
      this.element.scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "start" });
    },

    async reload() {
      const jobId = shown.jobId;
      if (!jobId) return;
      this.listed = live.head?.listed;
      try {
        const lineage = await ask("lineage", jobId);
        if (shown.jobId !== jobId || shown.deleted) return;
        Object.assign(shown, lineage, { problem: "" });
        for (const job of live.jobs.values()) this.take(job);
      } catch (error) {
        if (shown.jobId !== jobId) return;
        shown.problem = error.message;
        if (error.refused) {
          shown.problem = error.message.includes("is in the trash")
            ? "This video is in the trash. The history shows it under “Trash”, where it can be restored."
            : "This video is not here. It may have been deleted, or the link is incomplete.";
          Object.assign(shown, { preview: null, enhance: null });
        }
      }
      this.render();
    },

    /** Take over a newer view of a job that is shown, or a new enhance of the preview shown. */
    take(job) {
      if (shown.deleted?.id === job.id) return;
      if (job.enhanced) {
        const ours = shown.jobId === job.id || shown.preview?.id === job.parent_id;
        if (ours && (!shown.enhance || shown.enhance.id <= job.id)) shown.enhance = job;
      } else if (shown.jobId === job.id || shown.enhance?.parent_id === job.id) {
        shown.preview = job;
      }
    },

    follow(changed) {
      if (!shown.jobId) return;
      const before = this.current()?.status;
      for (const job of changed) {
        if (!job.gone) this.take(job);
        else if (job.id !== shown.deleted?.id && job.id !== this.leaving) this.reload();
      }
      const job = this.current();
      if (job && before && job.status !== before) announce(`${kindName(job)}: ${statusName(job)}`);
      this.render();
    },

    /** Whether somebody may have asked for an enhance of the preview that is shown. */
    outdated() {
      const none = !shown.enhance || ["FAILED", "CANCELLED"].includes(shown.enhance.status);
      const awaited = shown.preview?.status === "COMPLETED" && none && !shown.deleted;
      return awaited && live.head.listed !== this.listed;
    },

    /** The job that is worth a word: the enhance when it is shown, else the preview. */
    current() {
      return shown.enhance ?? shown.preview;
    },

    render() {
      const jobs = [shown.preview, shown.enhance].filter((job) => job);
      setText(this.prompt, jobs[0]?.prompt ?? "");
      this.prompt.hidden = !jobs.length;
      setText(this.problem, shown.problem);
      this.problem.hidden = !shown.problem;
      this.empty.hidden = jobs.length > 0 || Boolean(shown.problem) || Boolean(shown.deleted);
      this.renderUndo();
      this.renderTiles(jobs);
      this.pair(jobs);
      this.showTitle();
      stream.name();
    },

    renderTiles(jobs) {
      for (const [jobId, tile] of this.tiles) {
        if (jobs.some((job) => job.id === jobId)) continue;
        tile.element.remove();
        this.tiles.delete(jobId);
      }
      for (const job of jobs) {
        if (!this.tiles.has(job.id)) this.tiles.set(job.id, new Tile(job.id));
        const tile = this.tiles.get(job.id);
        tile.update(job);
        if (!tile.element.isConnected) {
          if (job.enhanced) this.grid.append(tile.element);
          else this.grid.prepend(tile.element);
        }
      }
      this.grid.dataset.count = jobs.length;
    },

    pair(jobs) {
      const videos = jobs.filter((job) => job.video_url).map((job) => this.tiles.get(job.id).video);
      const key = videos.length === 2 ? jobs.map((job) => job.id).join() : "";
      if (key === this.paired) return;
      this.unpair?.();
      this.paired = key;
      this.unpair = key ? playTogether(...videos) : null;
    },

    renderUndo() {
      this.undo.hidden = !shown.deleted;
      if (!shown.deleted || this.undo.dataset.job === shown.deleted.id) return;
      this.undo.dataset.job = shown.deleted.id;
      const job = shown.deleted;
      const restore = button("undo", "Undo", () => attempt(() => this.restore(job)), { icon: "undo" });
      const text = `${kindName(job)} moved to the trash.`;
      this.undo.replaceChildren(h("span", { textContent: text }), restore);
      this.undo.hidden = false;
      restore.focus();
      announce(text);
    },

    showTitle() {
      const job = this.current();
      const running = job?.status === "PROCESSING" && job.step > 0;
      const title = running ? `${job.step}/${job.steps} · Mochi` : "Mochi";
      if (document.title !== title) document.title = title;
    },

    async enhance(jobId) {
      this.take(await ask("enhance_job", jobId));
      gallery.refresh();
    },

    async retry(job) {
      if (job.enhanced) {
        const enhance = await ask("enhance_job", job.parent_id);
        if (shown.jobId === job.id) return this.select(enhance.id, enhance);
        return this.take(enhance);
      }
      const again = await ask("retry_job", job.id);
      gallery.refresh();
      return this.select(again.id, again);
    },

    async delete(job) {
      this.leaving = job.id; // the stream may tell so before the answer does
      try {
        await ask("delete_job", job.id);
        shown.deleted = job;
      } finally {
        this.leaving = null;
      }
      if (job.enhanced) shown.enhance = null;
      else shown.preview = null;
      gallery.refresh();
    },

    async restore(job) {
      const restored = await ask("restore_job", job.id);
      shown.deleted = null;
      delete this.undo.dataset.job;
      this.take(restored);
      gallery.refresh();
      this.element.focus({ preventScroll: true });
    },
  };

  // History

  class Card {
    constructor(job) {
      this.image = h("img", { className: "m-poster", loading: "lazy", decoding: "async", alt: "" });
      this.placeholder = h("span", { className: "m-placeholder" });
      this.badges = h("span", { className: "m-badges" });
      this.prompt = h("span", { className: "m-card-prompt", dir: "auto" });
      this.when = h("span", { className: "m-card-when" });
      this.link = h(
        "a",
        { className: "m-card-link", href: `?job=${encodeURIComponent(job.id)}` },
        h("span", { className: "m-card-media" }, this.image, this.placeholder, this.badges),
        this.prompt,
        this.when,
      );
      this.link.onclick = (event) => this.open(event);
      this.element = h("li", { className: "m-card" }, this.link);
      this.element.dataset.job = job.id;
      this.update(job);
    }

    open(event) {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return; // a tab of its own
      event.preventDefault();
      if (this.job.deleted_at !== null) return;
      panel.select(this.job.id, this.job);
      panel.element.focus({ preventScroll: true });
      panel.reveal();
    }

    update(job) {
      this.job = job;
      const source = job.poster_url ? fileUrl(job.poster_url) : !ended(job) && job.image;
      this.image.hidden = !source;
      if (source && this.image.getAttribute("src") !== source) this.image.src = source;
      this.placeholder.hidden = Boolean(job.poster_url);
      setText(this.placeholder, this.describe(job));
      this.element.dataset.status = job.status.toLowerCase();
      setText(this.prompt, job.prompt);
      this.prompt.title = job.prompt;
      const by = me.login && job.owner ? `${job.owner} · ` : "";
      setText(this.when, by + age(job.submitted_at));
      const badges = this.badgeTexts(job);
      if (this.badgeKey !== badges.join()) {
        this.badgeKey = badges.join();
        this.badges.replaceChildren(...badges.map(([name, text]) => badge(name, text)));
      }
      this.showRestore(job);
    }

    describe(job) {
      if (job.deleted_at !== null) return "In the trash";
      if (job.status === "PROCESSING" && job.step > 0) return `Step ${job.step} of ${job.steps}`;
      if (job.status === "PENDING" && job.position) return `Place ${job.position} in the queue`;
      return statusName(job);
    }

    badgeTexts(job) {
      const texts = [["steps", `${job.num_inference_steps} steps`]];
      if (job.enhanced) texts.unshift(["enhanced", "Enhanced"]);
      if (job.evicted_at !== null) texts.push(["evicted", "Video removed"]);
      if (job.video_missing) texts.push(["evicted", "Video missing"]);
      if (job.starred) texts.push(["star", "Starred"]);
      return texts;
    }

    showRestore(job) {
      const trashed = job.deleted_at !== null;
      if (!trashed) return;
      this.link.removeAttribute("href");
      if (this.restore) return;
      this.restore = button("restore", "Restore", () => gallery.restore(job), { icon: "undo" });
      this.restore.setAttribute("aria-label", `Restore: ${job.prompt}`);
      this.restore.disabled = !mine(job);
      this.restore.title = mine(job) ? "" : notMine(job);
      this.element.append(this.restore);
    }
  }

  function badge(name, text) {
    const element = h("span", { className: `m-chip m-chip-${name}` });
    if (name === "star") element.append(icon("star"), h("span", { className: "m-hidden", textContent: text }));
    else element.append(text);
    return element;
  }

  const gallery = {
    filter: "all",
    query: "",
    page: 1,
    total: 0,
    cards: new Map(),
    listed: 0, // as `/events` counts: when it moves, jobs have come or gone
    marked: 0, // likewise: a status or a star has changed
    asked: 0,
    timer: 0,
    renewing: 0,
    renewedAt: -Infinity,

    mount(part) {
      this.search = h("input", {
        type: "search",
        className: "m-input",
        id: "mochi-search",
        placeholder: "Search prompts",
        maxLength: 200,
        autocomplete: "off",
        "aria-label": "Search prompts",
      });
      this.search.oninput = () => this.later(SEARCH_PAUSE, { query: this.search.value, page: 1 });
      this.select = h("select", { className: "m-input", id: "mochi-filter", "aria-label": "Show" });
      this.select.append(...FILTERS.map(([value, text]) => h("option", { value, textContent: text })));
      this.select.onchange = () => this.later(0, { filter: this.select.value, page: 1 });
      this.emptyTrash = button("empty-trash", "Empty trash", () => this.confirm(), { icon: "trash" });
      this.count = h("p", { className: "m-total", role: "status" });
      this.list = h("ul", { className: "m-cards", "aria-labelledby": "mochi-history" });
      this.none = h("p", { className: "m-none m-subdued" });
      this.problem = h("p", { className: "m-problem", role: "alert", hidden: true });
      const turn = (by) => () => this.later(0, { page: this.page + by }, true);
      this.previous = button("previous", "Newer", turn(-1));
      this.next = button("next", "Older", turn(1));
      this.where = h("span", { className: "m-where" });
      this.pages = h("nav", { className: "m-pages", "aria-label": "Pages of the history" });
      this.pages.append(this.previous, this.where, this.next);
      this.element = h(
        "section",
        { className: "m-gallery" },
        h(
          "div",
          { className: "m-gallery-head" },
          h("h2", { textContent: "History", id: "mochi-history" }),
          this.count,
          h("div", { className: "m-tools" }, this.emptyTrash, this.search, this.select),
        ),
        this.problem,
        this.list,
        this.none,
        this.pages,
      );
      part.element.replaceChildren(this.element, this.makeDialog());
    },

    makeDialog() {
      this.question = h("p", { id: "mochi-question" });
      const close = () => this.dialog.close();
      const empty = () => {
        close();
        this.run(() => ask("empty_trash", null));
      };
      this.dialog = h(
        "dialog",
        { className: "m-dialog", "aria-labelledby": "mochi-question" },
        this.question,
        h(
          "div",
          { className: "m-actions" },
          button("keep", "Keep them", close),
          button("empty", "Delete for good", empty, { className: "m-danger" }),
        ),
      );
      return this.dialog;
    },

    /** The whole trash is meant, whatever is searched for. */
    confirm() {
      return this.run(async () => {
        const trash = await ask("list_jobs", { filter: "trash", query: "", page: 1, page_size: 1 });
        const what = plural(trash.total, "job", "jobs");
        setText(this.question, `Delete ${what} in the trash for good? This cannot be undone.`);
        this.dialog.showModal();
      });
    },

    /** Ask again after a pause, in which further changes join. */
    later(pause, changes = {}, scroll = false) {
      Object.assign(this, changes);
      clearTimeout(this.timer);
      this.timer = setTimeout(async () => {
        await this.refresh();
        if (scroll) this.element.scrollIntoView({ block: "start" });
      }, pause);
    },

    async run(action) {
      try {
        await action();
        await this.refresh();
      } catch (error) {
        setText(this.problem, error.message);
        this.problem.hidden = false;
      }
    },

    restore(job) {
      return this.run(() => ask("restore_job", job.id));
    },

    async refresh() {
      const asked = ++this.asked;
      const { filter, query, page } = this;
      try {
        const found = await ask("list_jobs", { filter, query, page, page_size: PAGE_SIZE });
        if (asked !== this.asked) return; // a later question is on its way
        const last = Math.max(1, Math.ceil(found.total / PAGE_SIZE));
        if (page > last) return this.later(0, { page: last });
        this.problem.hidden = true;
        Object.assign(this, { total: found.total, listed: found.listed, marked: found.marked });
        this.render(found.jobs);
      } catch (error) {
        setText(this.problem, error.message);
        this.problem.hidden = false;
      }
    },

    render(jobs) {
      const fresh = new Map();
      for (const job of jobs) {
        const newer = job.deleted_at === null ? (live.jobs.get(job.id) ?? job) : job;
        const card = this.cards.get(job.id);
        const reusable = card && (card.job.deleted_at === null) === (job.deleted_at === null);
        if (reusable) card.update(newer);
        fresh.set(job.id, reusable ? card : new Card(newer));
      }
      this.cards = fresh;
      const elements = [...fresh.values()].map((card) => card.element);
      const same = elements.length === this.list.children.length
        && elements.every((element, index) => element === this.list.children[index]);
      if (!same) this.list.replaceChildren(...elements);
      this.renderFrame();
      this.markSelected();
      stream.name();
    },

    renderFrame() {
      const last = Math.max(1, Math.ceil(this.total / PAGE_SIZE));
      const trash = this.filter === "trash";
      setText(this.count, plural(this.total, "job", "jobs"));
      setText(this.where, `Page ${this.page} of ${last}`);
      this.previous.disabled = this.page <= 1;
      this.next.disabled = this.page >= last;
      this.pages.hidden = last < 2;
      this.emptyTrash.hidden = !trash || (me.login && !me.admin);
      this.emptyTrash.disabled = this.total === 0 && !this.query;
      this.none.hidden = this.total > 0;
      setText(this.none, this.noneText());
    },

    noneText() {
      if (this.query.trim()) return "No prompt has these words.";
      if (this.filter === "trash") return "The trash is empty.";
      if (this.filter !== "all") return "Nothing here yet.";
      return "Everybody's videos will be kept here.";
    },

    markSelected() {
      const chosen = [shown.jobId, shown.preview?.id, shown.enhance?.id];
      for (const [jobId, card] of this.cards) {
        if (chosen.includes(jobId) && card.job.deleted_at === null) card.link.setAttribute("aria-current", "true");
        else card.link.removeAttribute("aria-current");
      }
    },

    /** Keep cards of live jobs fresh; ask again when the history has changed. */
    follow(changed) {
      for (const job of changed) {
        if (!job.gone && this.filter !== "trash") this.cards.get(job.id)?.update(job);
      }
      if (!this.renewing && (this.outdated() || panel.outdated())) this.renew();
    },

    /** Whether the first page may list other jobs by now. Later ones and the trash stay as they are. */
    outdated() {
      if (this.page > 1 || this.filter === "trash") return false;
      const unmarked = ["all", "previews", "enhanced"].includes(this.filter);
      return live.head.listed !== this.listed || (!unmarked && live.head.marked !== this.marked);
    },

    renew() {
      const pause = Math.max(REFRESH_PAUSE, this.renewedAt + REFRESH_LEAST - performance.now());
      this.renewing = setTimeout(() => {
        Object.assign(this, { renewing: 0, renewedAt: performance.now() });
        if (panel.outdated()) panel.reload();
        if (this.outdated()) this.refresh();
      }, pause);
    },
  };

  // Form: Gradio's components; only what passes between them and the panel is here

  const form = {
    reused: null, // the job whose values are wanted in the form
    drawn: "", // the newest job's seed

    mount(part) {
      this.message = h("p", { className: "m-problem", role: "alert", hidden: true });
      part.element.replaceChildren(this.message);
    },

    focus() {
      document.querySelector("#mochi-prompt-box textarea")?.focus({ preventScroll: true });
    },

    /** Where most visits begin, as soon as Gradio shows the form. Its own autofocus would take the
     * focus back whenever the text changes. */
    focusFirst(frames = 300) {
      if (document.activeElement !== document.body || frames === 0) return;
      this.focus();
      requestAnimationFrame(() => this.focusFirst(frames - 1));
    },

    /** A seed that is typed or pasted is meant. (Gradio's own input event misses a paste.) */
    pin(field) {
      if (!field.matches?.("#mochi-seed input[type=text]") || !field.value) return;
      const random = document.querySelector("#mochi-seed input[type=checkbox]");
      if (random?.checked) random.click();
    },

    key(event) {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      if (!event.target.closest?.("#mochi-ask")) return;
      event.preventDefault();
      document.querySelector("#mochi-generate")?.click();
    },

    /** What became of a Generate. */
    submitted(outcome) {
      if (!outcome) return;
      this.message.hidden = !outcome.error;
      setText(this.message, outcome.error ?? "");
      if (!outcome.job) return;
      this.drawn = String(outcome.job.seed);
      parts.panel.trigger("drawn");
      panel.select(outcome.job.id, outcome.job);
      gallery.refresh();
      announce("Job accepted.");
      panel.reveal();
    },

    reuse(job) {
      this.reused = job;
      parts.panel.trigger("reuse");
      this.focus();
      announce("Prompt, seed and settings are in the form.");
    },

    /** Values for the form's components, in the order of `ui.py`. */
    values() {
      const job = this.reused;
      return [
        job.prompt,
        job.negative_prompt,
        false,
        String(job.seed),
        job.num_inference_steps,
        job.guidance_scale,
        job.height,
        job.width,
        job.num_frames,
        job.schedule,
        document.getElementById("mochi-lora") ? (job.lora ?? "") : "", // none on offer: no field
        job.lora_scale,
      ];
    },
  };

  // Start, once every part is on the page

  const mounts = { header, form, panel, gallery };

  function attach(name, part) {
    parts[name] = part;
    mounts[name].mount(part);
    if (Object.keys(mounts).every((other) => parts[other])) start();
  }

  function start() {
    const jobId = new URL(location.href).searchParams.get("job");
    ask("whoami", null).then(known, () => {});
    panel.select(jobId);
    gallery.refresh();
    stream.follow();
    form.focusFirst();
    document.addEventListener("visibilitychange", () => stream.follow());
    window.addEventListener("online", () => stream.follow());
    setInterval(tick, 1000);
  }

  /** Show what depends on who looks. */
  function known(who) {
    Object.assign(me, who);
    header.render();
    panel.render();
    gallery.refresh();
  }

  function tick() {
    if (stream.source && live.connected && sinceEvent() > SILENCE) stream.lost();
    header.render();
    for (const tile of panel.tiles.values()) if (tile.job && !ended(tile.job)) tile.tick();
  }

  window.Mochi = {
    attach,
    submitted: (outcome) => form.submitted(outcome),
    reused: () => form.values(),
    drawn: () => form.drawn,
    reconnect: () => stream.lost(),
  };
  document.addEventListener("keydown", (event) => form.key(event));
  document.addEventListener("input", (event) => form.pin(event.target));
  for (const [name, part] of window.mochiParts ?? []) attach(name, part);
})();
