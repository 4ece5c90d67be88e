// Layer by slot; the classes are those of "is anything left of the change".
const SURVIVAL = [0.5, 0.8, 0.95, 0.99];
const survivalClass = (ratio) => SURVIVAL.filter((limit) => ratio >= limit).length;
const SLOTS = ['attn_q', 'attn_k', 'attn_v', 'attn_qkv', 'attn_output', 'ffn_gate', 'ffn_up', 'ffn_down'];

function slotOrder(slots) {
  const rank = (slot) => (SLOTS.indexOf(slot) + 1 || SLOTS.length + 1);
  return [...new Set(slots)].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
}

function survivalChart(width) {
  const tensors = chosenFile().survival;
  if (!tensors.length) return null;
  const slots = slotOrder(tensors.map((tensor) => tensor.slot));
  const layers = [...new Set(tensors.map((tensor) => tensor.layer))].sort((a, b) => (a === '') - (b === '') || a - b);
  const left = Math.max(...slots.map((slot) => textWidth(slot, 12))) + 14;
  const cell = Math.min(84, (width - left - 8) / layers.length);
  const step = Math.max(1, Math.ceil(24 / cell));
  return Plot.plot({
    width: Math.min(width, left + 8 + Math.max(cell * layers.length, 380)),
    height: slots.length * 30 + 50,
    marginLeft: left,
    marginRight: Math.max(8, width < left + 400 ? 8 : 380 - cell * layers.length),
    marginTop: 6,
    marginBottom: 40,
    x: { domain: layers, label: null, padding: 0.06 },
    y: { domain: slots, label: null, padding: 0.1 },
    marks: [
      Plot.axisX({ tickSize: 0, tickFormat: (layer, index) => (layer === '' ? 'no layer' : index % step ? '' : layer), label: 'Layer', labelArrow: 'none', labelAnchor: 'left', labelOffset: 34 }),
      Plot.axisY({ tickSize: 0, tickPadding: 8, fill: 'var(--ink)', fontSize: 12 }),
      Plot.cell(tensors, { x: 'layer', y: 'slot', rx: 2, fill: (tensor) => `var(--s${survivalClass(tensor.ratio)})`, title: (tensor) => `${tensor.layer === '' ? '' : `layer ${tensor.layer}, `}${tensor.slot} as ${tensor.type}: ${tensor.ratio.toFixed(3)}`, tip: true }),
      ...(cell >= 34 ? [Plot.text(tensors, { x: 'layer', y: 'slot', text: (tensor) => tensor.ratio.toFixed(2), fill: (tensor) => `var(--on-s${survivalClass(tensor.ratio)})`, fontSize: 12 })] : []),
    ],
  });
}

function survivalLegend() {
  const names = ['below 0.5', '0.5 to 0.8', '0.8 to 0.95', '0.95 to 0.99', '0.99 and more'];
  const items = names.map((name, index) => element('li', {}, element('i', { style: `background: var(--s${index})` }), name));
  return element('ul', { class: 'legend', 'aria-label': 'Colors of the heat map' }, ...items);
}
