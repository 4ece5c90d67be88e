// Size against divergence, with the line of the files that no other beats.
function sizesChart(width) {
  const files = DATA.files.filter((file) => file.size > 0 && file.kld > 0);
  if (files.length < 2) return null;
  const unit = Math.max(...files.map((file) => file.size)) >= 1e9 ? ['GB', 1e9] : ['MB', 1e6];
  const points = files.map((file) => ({ ...file, x: file.size / unit[1] }));
  const front = points.filter((point) => point.front).sort((a, b) => a.x - b.x);
  const limit = DATA.kld_limit > 0 ? [DATA.kld_limit] : [];
  const y = logarithmic([...points.map((point) => point.kld), ...limit]);
  const sizes = points.map((point) => point.x);
  const wide = Math.max(...sizes) > 3 * Math.min(...sizes);
  const x = wide ? logarithmic(sizes, 1.25) : { type: 'linear', domain: [0, 1.08 * Math.max(...sizes)], ticks: Math.max(3, Math.floor(width / 110)) };
  const options = {
    width,
    height: Math.max(280, Math.min(400, width * 0.5)),
    marginLeft: 52,
    marginRight: 24,
    marginTop: 34,
    marginBottom: 42,
    x: { ...x, label: null },
    y: { ...y, label: null, grid: true },
    symbol: { type: 'identity' },
  };
  const scales = Plot.plot(options);
  const labels = placedLabels(points, (name) => scales.scale(name), options);
  const color = (point) => (point.passed ? 'var(--pass)' : point.passed === false ? 'var(--fail)' : 'var(--soft)');
  return Plot.plot({
    ...options,
    marks: [
      Plot.axisY({ tickSize: 0, ticks: y.ticks, tickFormat: power, label: 'Mean KL divergence, nats per token', labelArrow: 'none', labelAnchor: 'top' }),
      Plot.axisX({ tickSize: 0, ticks: x.ticks, tickFormat: plain, label: `File size, ${unit[0]}`, labelArrow: 'none', labelAnchor: 'left', labelOffset: 36 }),
      Plot.line(front, { x: 'x', y: 'kld', stroke: 'var(--quiet)', strokeWidth: 2 }),
      Plot.ruleY(limit, { stroke: 'var(--fail)', strokeDasharray: '4 3', strokeWidth: 1.5 }),
      Plot.text(limit, { y: (value) => value, frameAnchor: 'right', dy: -8, text: (value) => `gate ${plain(value)}`, fill: 'var(--fail)' }),
      Plot.dot(points, { x: 'x', y: 'kld', r: 6, symbol: (point) => (point.passed !== false ? 'circle' : 'times'), fill: (point) => (point.passed === false ? 'none' : point.front ? color(point) : 'var(--page)'), stroke: color, strokeWidth: 2 }),
      ...labels.map((label) => Plot.text([label], { x: 'x', y: 'kld', text: 'short', dx: label.dx, dy: label.dy, textAnchor: label.anchor, fill: 'var(--ink)', fontSize: 13, fontWeight: label.index === state.file ? 700 : 400, stroke: 'var(--page)', strokeWidth: 4 })),
    ],
  });
}

// Each label at the first place where it covers no point and no other label; where there is none it is left out, for
// the table has all names.
const PLACES = [
  ['start', 11, -9], ['start', 11, 11], ['end', -11, 11], ['end', -11, -9], ['middle', 0, -17], ['middle', 0, 18],
  ['start', 11, -24], ['end', -11, 26], ['start', 11, 26], ['end', -11, -24],
];
const SHIFT = { start: 0, middle: 0.5, end: 1 };
function placedLabels(points, scale, { width, marginLeft }) {
  const [x, y] = [scale('x'), scale('y')];
  const taken = points.map((point) => box(x.apply(point.x) - 7, y.apply(point.kld) - 7, 14, 14));
  return points.flatMap((point) => {
    const size = textWidth(point.short, 13);
    const boxes = PLACES.map(([anchor, dx, dy]) =>
      box(x.apply(point.x) + dx - SHIFT[anchor] * size, y.apply(point.kld) + dy - 8, size, 16));
    const fits = (each) => each.left > marginLeft && each.right < width && !taken.some((other) => overlap(each, other));
    const place = boxes.findIndex(fits);
    if (place < 0) return [];
    taken.push(boxes[place]);
    const [anchor, dx, dy] = PLACES[place];
    return { ...point, index: DATA.files.findIndex((file) => file.name === point.name), anchor, dx, dy };
  });
}

const box = (left, top, width, height) => ({ left, top, right: left + width, bottom: top + height });
const overlap = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
