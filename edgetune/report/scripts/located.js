// Which tensors' types cost most, as a share of the file's divergence.
function locatedChart(width) {
  const found = chosenFile().located;
  if (!found?.kinds?.length || !(found.kld > 0)) return null;
  const swaps = [...found.kinds.map((swap) => ({ ...swap, kind: true })), ...(found.layers ?? [])]
    .filter((swap) => swap.gain != null)
    .map((swap) => ({ ...swap, name: swap.tensor.replace(/\.weight$/, ''), share: swap.gain / found.kld }));
  if (!swaps.length) return null;
  const left = Math.min(Math.max(...swaps.map((swap) => textWidth(swap.name, 13))) + 18, width * 0.45);
  return Plot.plot({
    width,
    height: swaps.length * 26 + 56,
    marginLeft: left,
    marginRight: 64,
    marginBottom: 40,
    x: { domain: [Math.min(0, d3.min(swaps, (swap) => swap.share)), Math.max(0.1, d3.max(swaps, (swap) => swap.share))], label: null, grid: true },
    y: { domain: swaps.map((swap) => swap.name), label: null, padding: 0.25 },
    marks: [
      Plot.axisY({ tickSize: 0, tickPadding: 8, fill: 'var(--ink)', tickFormat: (name) => clipped(name, left - 16) }),
      Plot.axisX({ tickSize: 0, ticks: 4, tickFormat: (value) => `${Math.round(100 * value)} %`.replace('-', '−'), label: 'Share of the mean KL divergence', labelArrow: 'none', labelAnchor: 'left', labelOffset: 34 }),
      Plot.barX(swaps, { x: 'share', y: 'name', fill: (swap) => (swap.kind ? 'var(--accent)' : 'var(--quiet)') }),
      Plot.text(swaps, { x: (swap) => Math.max(0, swap.share), y: 'name', text: (swap) => percent(swap.share).replace('-', '−'), dx: 6, textAnchor: 'start', fill: 'var(--ink)' }),
    ],
  });
}
