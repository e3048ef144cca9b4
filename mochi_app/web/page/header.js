// @ts-check
// The header: how the server is, and who looks at the page.

import { h, setText } from "./dom.js";
import { remaining } from "./format.js";

/** @typedef {import("./state.js").Store} Store */
/** @typedef {import("./state.js").Slot} Slot */

const LOST = "Connection to the server lost, reconnecting";

export class Header {
  /**
   * @param {HTMLElement} element
   * @param {Store} store
   */
  constructor(element, store) {
    this.store = store;
    this.dot = h("span", { className: "m-dot", "aria-hidden": "true" });
    this.slots = h("span", { className: "m-slots", textContent: "Connecting" });
    this.counts = h("span", { className: "m-counts" });
    this.who = h("span", { className: "m-who" });
    const out = { className: "m-logout", method: "post", action: "./logout", hidden: true };
    this.logout = h("form", out);
    this.logout.append(this.who, h("button", { className: "m-button", textContent: "Log out" }));
    const log_in = { className: "m-button", href: "./", textContent: "Log in", hidden: true };
    this.login = h("a", log_in);
    this.announcer = h("p", { className: "m-hidden", role: "status", "aria-live": "polite" });
    this.gate = h("p", { className: "m-problem m-gate", role: "alert", hidden: true });
    element.replaceChildren(
      h(
        "header",
        { className: "m-header" },
        h("h1", { className: "m-brand", textContent: "Mochi" }),
        h("p", { className: "m-status", id: "mochi-status" }, this.dot, this.slots, this.counts),
        this.login,
        this.logout,
      ),
      this.gate,
      this.announcer,
    );
  }

  /** @param {string} text */
  announce(text) {
    setText(this.announcer, text);
  }

  /** @param {{closed: boolean, told: string}} gate */
  showGate({ closed, told }) {
    setText(this.gate, told);
    this.gate.hidden = !closed;
  }

  render() {
    const { live, me } = this.store;
    setText(this.who, me.name ?? "");
    this.logout.hidden = !me.login;
    this.login.hidden = !live.loggedOut;
    if (live.connected === false) {
      this.dot.dataset.state = "lost";
      setText(this.slots, live.loggedOut ? "You are logged out" : LOST);
      setText(this.counts, "");
      return;
    }
    if (!live.head) return;
    const { pending, processing, held } = live.head;
    this.dot.dataset.state = worst(live.slots);
    setText(this.slots, describe(live.slots, this.store.serverNow(), live.slotsAt));
    const kept = held ? ` · ${held} held` : "";
    setText(this.counts, `${processing} running · ${pending} waiting${kept}`);
  }
}

/** @param {Slot} slot */
const isUp = (slot) => slot.state === "ready" || slot.state === "busy";

/**
 * The colour of all slots together.
 * @param {Slot[]} slots
 */
export function worst(slots) {
  if (slots.every(isUp)) return "ready";
  const trouble = slots.some((slot) => slot.state === "broken" || slot.state === "restarting");
  return trouble ? "trouble" : "loading";
}

/**
 * The slots in words.
 * @param {Slot[]} slots
 * @param {number} now seconds on the stream's clock
 * @param {number} toldAt when they were told, on the same clock
 */
export function describe(slots, now, toldAt) {
  const up = slots.filter(isUp);
  const others = slots.filter((slot) => !isUp(slot));
  const told = others.map((slot) => {
    const name = slots.length > 1 ? `slot ${slot.slot} ` : "";
    return name + explain(slot, now, toldAt);
  });
  if (up.length) {
    const busy = up.every((slot) => slot.state === "busy");
    const count = slots.length > 1 ? ` ${up.length} of ${slots.length}` : "";
    told.unshift((busy ? "Busy" : "Ready") + count);
  }
  const text = told.join(" · ");
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/**
 * Why a slot is not up. "loading the model, 12 s" goes on counting between two events.
 * @param {Slot} slot
 * @param {number} now
 * @param {number} toldAt
 */
function explain(slot, now, toldAt) {
  if (slot.state === "loading" || slot.state === "starting") {
    const counted = slot.detail.replace(/, (\d+) s$/, (_, seconds) => {
      return `, ${Math.round(Number(seconds) + now - toldAt)} s`;
    });
    return counted || slot.state;
  }
  const reason = slot.detail ? `: ${slot.detail}` : "";
  const left = slot.retry_at === null ? 0 : slot.retry_at - now;
  const retry = left > 0 ? `, again in ${remaining(left)}` : "";
  return slot.state + reason + retry;
}
