// @ts-check
// Elements. A caller's text reaches the page as text nodes only.

const SVG = "http://www.w3.org/2000/svg";

const ICONS = {
  star: "M12 3.6l2.6 5.3 5.8.8-4.2 4.1 1 5.8-5.2-2.7-5.2 2.7 1-5.8-4.2-4.1 5.8-.8z",
  sparkle:
    "M12 3l1.8 5.2L19 10l-5.2 1.8L12 17l-1.8-5.2L5 10l5.2-1.8z" +
    "M19 16l.8 2.2L22 19l-2.2.8L19 22l-.8-2.2L16 19l2.2-.8z",
  download: "M12 4v11m0 0l-4.5-4.5M12 15l4.5-4.5M5 20h14",
  reuse:
    "M4 12a8 8 0 0 1 13.7-5.6L20 8.6M20 4v4.6h-4.6M20 12a8 8 0 0 1-13.7 5.6L4 15.4M4 20v-4.6h4.6",
  link:
    "M10 14a4 4 0 0 0 5.7 0l3-3a4 4 0 0 0-5.7-5.7l-1 1" +
    "M14 10a4 4 0 0 0-5.7 0l-3 3a4 4 0 0 0 5.7 5.7l1-1",
  trash: "M5 7h14M10 7V4.5h4V7M7 7l.8 12.5h8.4L17 7M10.5 10.5v6M13.5 10.5v6",
  stop: "M7 7h10v10H7z",
  undo: "M9 8L5 12l4 4M5 12h9a5 5 0 0 1 0 10h-2",
  film: "M4 5h16v14H4zM8 5v14M16 5v14M4 9.5h4M4 14.5h4M16 9.5h4M16 14.5h4",
};

/** @typedef {keyof typeof ICONS} IconName */

/**
 * An element. Properties are set as such; `data-`, `aria-` and `role` as attributes.
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, unknown>} [properties]
 * @param {...(Node | string)} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.includes("-") || name === "role") element.setAttribute(name, String(value));
    else Object.assign(element, { [name]: value });
  }
  element.append(...children);
  return element;
}

/** @param {IconName} name */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const path = document.createElementNS(SVG, "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.classList.add("m-icon", `m-icon-${name}`);
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/**
 * Set a text only when it differs, so that a selection or a screen reader is left in peace.
 * @param {Node} element
 * @param {string} text
 */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/**
 * @typedef {object} ButtonOptions
 * @property {IconName} [icon]
 * @property {string} [className]
 * @property {string} [title]
 * @property {boolean} [disabled]
 */

/**
 * @param {string} name what `data-action` says
 * @param {string} label
 * @param {(element: HTMLButtonElement) => unknown} action
 * @param {ButtonOptions} [options]
 */
export function button(name, label, action, options = {}) {
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

/**
 * What stands where a video would.
 * @param {string} text
 */
export function note(text) {
  return h("p", { className: "m-note" }, icon("film"), h("span", { textContent: text }));
}
