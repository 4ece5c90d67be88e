// Five classes of divergence, in nats; the histogram and the heat map share them.
const CLASSES = [
  { from: 0, name: 'below 0.001' },
  { from: 0.001, name: '0.001 to 0.01' },
  { from: 0.01, name: '0.01 to 0.1' },
  { from: 0.1, name: '0.1 to 1' },
  { from: 1, name: '1 nat and more' },
];
function classOf(kld) {
  let found = 0;
  CLASSES.forEach((each, index) => { if (kld >= each.from) found = index; });
  return found;
}

function bins(file) {
  const { edges, counts } = file.histogram;
  const total = counts.reduce((sum, count) => sum + count, 0) || 1;
  return counts.map((count, index) => ({ low: edges[index], high: edges[index + 1], count, share: count / total }));
}

const PERCENTILES = [['50', 'median'], ['90', '90 %'], ['99', '99 %'], ['max', 'worst']];

function spreadChart(width) {
  const file = chosenFile();
  if (!file.histogram) return null;
  const own = bins(file);
  const used = DATA.files.filter((each) => each.histogram).flatMap((each) => bins(each).filter((bin) => bin.count));
  const domain = [d3.min(used, (bin) => bin.low), d3.max(used, (bin) => bin.high)];
  const others = DATA.files.filter((each) => each !== file && each.histogram);
  const marks = PERCENTILES.map(([key, name]) => ({ name, value: file.percentiles[key] })).filter((each) => each.value != null);
  const shown = marks.map((each) => ({ ...each, x: Math.min(Math.max(each.value, domain[0]), domain[1]) }));
  return Plot.plot({
    width,
    height: 320 + 15 * rows(shown, width),
    marginLeft: 46,
    marginRight: 16,
    marginTop: 28 + 15 * rows(shown, width),
    marginBottom: 42,
    x: { type: 'log', domain, label: null },
    y: { ticks: 4, grid: true, label: null, percent: true, nice: true },
    marks: [
      Plot.axisX({ tickSize: 0, ticks: logarithmic(domain, 1).ticks, tickFormat: power, label: 'KL divergence of one token, nats', labelArrow: 'none', labelAnchor: 'left', labelOffset: 36 }),
      Plot.axisY({ tickSize: 0, ticks: 4, label: '% of tokens', labelArrow: 'none', labelAnchor: 'top', labelOffset: 40 }),
      Plot.rectY(own, { x1: 'low', x2: 'high', y: 'share', inset: 0.5, fill: (bin) => `var(--k${classOf(bin.low * 1.0001)})`, stroke: 'var(--soft)', strokeWidth: 0.5, title: (bin) => `${bin.count} tokens from ${short(bin.low)} to ${short(bin.high)} nats`, tip: true }),
      ...others.map((other) => Plot.line(bins(other), { x: (bin) => Math.sqrt(bin.low * bin.high), y: 'share', stroke: 'var(--quiet)', strokeWidth: 1, curve: 'monotone-x', clip: true })),
      Plot.ruleX(shown, { x: 'x', stroke: 'var(--ink)', strokeWidth: 1, strokeDasharray: '2 3' }),
      ...shown.map((each, index) => Plot.text([each], { x: 'x', frameAnchor: 'top', dy: -11 - 15 * lane(shown, index, width), text: (mark) => `${mark.name} ${short(mark.value, 2)}`, fill: 'var(--ink)', textAnchor: each.x > 0.1 * domain[1] ? 'end' : 'middle' })),
    ],
  });
}

// On a narrow screen the labels of the percentiles stand one above the other.
const lane = (shown, index, width) => (width < 560 ? index : index % 2);
const rows = (shown, width) => (shown.length ? lane(shown, shown.length - 1, width) + (width < 560 ? 0 : 1) : 0);
