//! The steps of a template as a drawing: layers from left to right, each layer in the order that
//! avoids the crossings that are easy to avoid.
//!
//! Pure: it lays out what it is given, and every page that shows a graph draws the same one. Many
//! like steps are drawn as one box with their counts, so that a graph of thousands stays readable.

use std::collections::{BTreeMap, HashMap};

use maud::{Markup, html};

use super::words::{self, Look};

/// Like steps with the same neighbours are one box once they are more than this.
const MOST_ALIKE: usize = 8;
/// With more boxes than this, every layer is one box per handler.
const MOST_BOXES: usize = 2000;

const BOX_WIDTH: f64 = 176.0;
const BOX_HEIGHT: f64 = 46.0;
const COLUMN: f64 = BOX_WIDTH + 56.0;
const ROW_GAP: f64 = 16.0;
const BEND_HEIGHT: f64 = 10.0;
const MARGIN: f64 = 8.0;

/// One step to draw.
#[derive(Debug, Clone, Default)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// The code that it runs; empty if it waits.
    pub handler: String,
    /// The indices of the steps that it depends on.
    pub depends_on: Vec<usize>,
    /// Its state; `None` in the graph of a template.
    pub state: Option<String>,
    /// A few words below the name: the attempt, what it waits for.
    pub detail: String,
    /// Where a click leads.
    pub href: Option<String>,
    /// Of a map: how many items, how many have ended, how many failed.
    pub items: Option<(i32, i32, i32)>,
    /// Whether its output chooses among the steps behind it, or a condition decides about it.
    pub decides: bool,
}

/// A graph, laid out. Lengths are in pixels.
#[derive(Debug, Clone, PartialEq)]
pub struct Drawing {
    width: f64,
    height: f64,
    boxes: Vec<Placed>,
    edges: Vec<Edge>,
}

#[derive(Debug, Clone, PartialEq)]
struct Placed {
    x: f64,
    y: f64,
    /// Indices of the steps that it stands for.
    members: Vec<usize>,
}

#[derive(Debug, Clone, PartialEq)]
struct Edge {
    /// Where it passes, from the right of one box to the left of another.
    points: Vec<(f64, f64)>,
    from: usize,
    to: usize,
}

/// Lays the steps out; `None` if there are none, or too many to draw.
pub fn layout(nodes: &[Node]) -> Option<Drawing> {
    let layers = layers(nodes)?;
    let mut groups = alike(nodes);
    if groups.len() > MOST_BOXES {
        groups = by_layer(nodes, &layers);
    }
    if groups.is_empty() || groups.len() > MOST_BOXES {
        return None;
    }
    let mut group_of = vec![0; nodes.len()];
    for (group, members) in groups.iter().enumerate() {
        for &member in members {
            group_of[member] = group;
        }
    }
    let layer_of: Vec<usize> =
        groups.iter().map(|members| members.iter().map(|&member| layers[member]).max().unwrap_or(0)).collect();
    let mut links: Vec<(usize, usize)> = nodes
        .iter()
        .enumerate()
        .flat_map(|(to, node)| node.depends_on.iter().map(move |&from| (from, to)))
        .map(|(from, to)| (group_of[from], group_of[to]))
        .filter(|&(from, to)| layer_of[from] < layer_of[to])
        .collect();
    links.sort_unstable();
    links.dedup();
    Some(Plan::new(groups, &layer_of, &links).draw())
}

/// The longest way from a root to each step; `None` for a cycle, which no checked template has.
fn layers(nodes: &[Node]) -> Option<Vec<usize>> {
    let mut children = vec![Vec::new(); nodes.len()];
    let mut open = vec![0; nodes.len()];
    for (to, node) in nodes.iter().enumerate() {
        for &from in &node.depends_on {
            children.get_mut(from)?.push(to);
            open[to] += 1;
        }
    }
    let mut layer = vec![0; nodes.len()];
    let mut ready: Vec<usize> = (0..nodes.len()).filter(|&node| open[node] == 0).collect();
    let mut seen = 0;
    while let Some(node) = ready.pop() {
        seen += 1;
        for &child in &children[node] {
            layer[child] = layer[child].max(layer[node] + 1);
            open[child] -= 1;
            if open[child] == 0 {
                ready.push(child);
            }
        }
    }
    (seen == nodes.len()).then_some(layer)
}

/// Steps with the same handler, parents and children, as one group where they are many.
fn alike(nodes: &[Node]) -> Vec<Vec<usize>> {
    let mut children = vec![Vec::new(); nodes.len()];
    for (to, node) in nodes.iter().enumerate() {
        for &from in &node.depends_on {
            children[from].push(to);
        }
    }
    let mut found: HashMap<(&str, Vec<usize>, &[usize]), usize> = HashMap::new();
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (index, node) in nodes.iter().enumerate() {
        let mut parents = node.depends_on.clone();
        parents.sort_unstable();
        // Without neighbours there is nothing that they share.
        let key = (node.handler.as_str(), parents, children[index].as_slice());
        let group = *found.entry(key).or_insert_with(|| {
            groups.push(Vec::new());
            groups.len() - 1
        });
        groups[group].push(index);
    }
    let mut split: Vec<Vec<usize>> = Vec::with_capacity(groups.len());
    for group in groups {
        if group.len() > MOST_ALIKE {
            split.push(group);
        } else {
            split.extend(group.into_iter().map(|member| vec![member]));
        }
    }
    split.sort_unstable_by_key(|members| members[0]);
    split
}

fn by_layer(nodes: &[Node], layers: &[usize]) -> Vec<Vec<usize>> {
    let mut groups: BTreeMap<(usize, &str), Vec<usize>> = BTreeMap::new();
    for (index, node) in nodes.iter().enumerate() {
        groups.entry((layers[index], node.handler.as_str())).or_default().push(index);
    }
    groups.into_values().collect()
}

/// What is placed: boxes, and the bends of edges that pass over layers.
struct Plan {
    groups: Vec<Vec<usize>>,
    links: Vec<(usize, usize)>,
    /// Of every link what it passes, box first and box last.
    ways: Vec<Vec<usize>>,
    /// By layer, in order from top to bottom.
    columns: Vec<Vec<usize>>,
    left: Vec<Vec<usize>>,
    right: Vec<Vec<usize>>,
    y: Vec<f64>,
    layer_of: Vec<usize>,
}

impl Plan {
    fn new(groups: Vec<Vec<usize>>, layer_of: &[usize], links: &[(usize, usize)]) -> Self {
        let mut layer_of = layer_of.to_vec();
        let mut columns = vec![Vec::new(); layer_of.iter().max().map_or(0, |last| last + 1)];
        for (item, &layer) in layer_of.iter().enumerate() {
            columns[layer].push(item);
        }
        let long: usize = links.iter().map(|&(from, to)| layer_of[to] - layer_of[from] - 1).sum();
        let mut ways = Vec::with_capacity(links.len());
        for &(from, to) in links {
            let mut way = vec![from];
            // Past some thousands nobody follows a single line any more.
            if long <= 4 * MOST_BOXES {
                for (layer, column) in columns.iter_mut().enumerate().take(layer_of[to]).skip(layer_of[from] + 1) {
                    column.push(layer_of.len());
                    way.push(layer_of.len());
                    layer_of.push(layer);
                }
            }
            way.push(to);
            ways.push(way);
        }
        let mut left = vec![Vec::new(); layer_of.len()];
        let mut right = vec![Vec::new(); layer_of.len()];
        for way in &ways {
            for pair in way.windows(2) {
                right[pair[0]].push(pair[1]);
                left[pair[1]].push(pair[0]);
            }
        }
        let y = vec![0.0; layer_of.len()];
        let mut plan = Self { groups, links: links.to_vec(), ways, columns, left, right, y, layer_of };
        plan.order();
        plan.place();
        plan
    }

    /// Each layer by the mean place of what it is tied to, to and fro.
    fn order(&mut self) {
        let mut place = vec![0.0; self.layer_of.len()];
        for column in &self.columns {
            renumber(column, &mut place);
        }
        let last = self.columns.len();
        for sweep in 0..6 {
            let forth = sweep % 2 == 0;
            for step in 0..last {
                let layer = if forth { step } else { last - 1 - step };
                let ties = if forth { &self.left } else { &self.right };
                let column = &mut self.columns[layer];
                let keys: HashMap<usize, f64> =
                    column.iter().map(|&item| (item, mean(&ties[item], &place).unwrap_or(place[item]))).collect();
                column.sort_by(|a, b| keys[a].total_cmp(&keys[b]));
                renumber(column, &mut place);
            }
        }
    }

    fn height(&self, item: usize) -> f64 {
        if item < self.groups.len() { BOX_HEIGHT } else { BEND_HEIGHT }
    }

    /// Centres: as near to those of the neighbours as the order allows.
    fn place(&mut self) {
        for column in &self.columns {
            let mut at = 0.0;
            for &item in column {
                self.y[item] = at + self.height(item) / 2.0;
                at += self.height(item) + ROW_GAP;
            }
            for &item in column {
                self.y[item] -= at / 2.0;
            }
        }
        let last = self.columns.len();
        for sweep in 0..4 {
            for step in 0..last {
                let layer = if sweep % 2 == 0 { step } else { last - 1 - step };
                let column = &self.columns[layer];
                let wanted: Vec<f64> = column
                    .iter()
                    .map(|&item| {
                        let ties: Vec<usize> = self.left[item].iter().chain(&self.right[item]).copied().collect();
                        mean(&ties, &self.y).unwrap_or(self.y[item])
                    })
                    .collect();
                let apart: Vec<f64> = column
                    .windows(2)
                    .map(|pair| f64::midpoint(self.height(pair[0]), self.height(pair[1])) + ROW_GAP)
                    .collect();
                let placed = keep_apart(&wanted, &apart);
                for (&item, y) in self.columns[layer].iter().zip(placed) {
                    self.y[item] = y;
                }
            }
        }
        let top = (0..self.y.len()).map(|item| self.y[item] - self.height(item) / 2.0).fold(f64::INFINITY, f64::min);
        for y in &mut self.y {
            *y += MARGIN - top;
        }
    }

    fn x(&self, item: usize) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a layer is one of a few thousand")]
        let layer = self.layer_of[item] as f64;
        MARGIN + layer * COLUMN
    }

    fn draw(self) -> Drawing {
        let edges = self
            .links
            .iter()
            .zip(&self.ways)
            .map(|(&(from, to), way)| {
                let mut points = Vec::with_capacity(way.len() * 2);
                for (place, &item) in way.iter().enumerate() {
                    let (x, y) = (self.x(item), self.y[item]);
                    if place > 0 {
                        points.push((x, y));
                    }
                    if place + 1 < way.len() {
                        points.push((x + BOX_WIDTH, y));
                    }
                }
                Edge { points, from, to }
            })
            .collect();
        let bottom = (0..self.y.len()).map(|item| self.y[item] + self.height(item) / 2.0).fold(0.0, f64::max);
        let right = (0..self.groups.len()).map(|item| self.x(item) + BOX_WIDTH).fold(0.0, f64::max);
        let boxes = (0..self.groups.len())
            .map(|item| Placed {
                x: self.x(item),
                y: self.y[item] - BOX_HEIGHT / 2.0,
                members: self.groups[item].clone(),
            })
            .collect();
        Drawing { width: right + MARGIN, height: bottom + MARGIN, boxes, edges }
    }
}

fn renumber(column: &[usize], place: &mut [f64]) {
    #[expect(clippy::cast_precision_loss, reason = "a place is one of a few thousand")]
    for (at, &item) in column.iter().enumerate() {
        // By its share, so that wide and narrow layers compare.
        place[item] = (at as f64 + 0.5) / column.len() as f64;
    }
}

fn mean(items: &[usize], of: &[f64]) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "a count of neighbours")]
    let count = items.len() as f64;
    (!items.is_empty()).then(|| items.iter().map(|&item| of[item]).sum::<f64>() / count)
}

/// The values nearest to the wanted ones (least squares) that keep their order and distances:
/// neighbours that would overlap are moved together, until none do.
fn keep_apart(wanted: &[f64], apart: &[f64]) -> Vec<f64> {
    let mut shift = vec![0.0; wanted.len()];
    for at in 1..wanted.len() {
        shift[at] = shift[at - 1] + apart[at - 1];
    }
    // Blocks of (sum, count) whose means rise.
    let mut blocks: Vec<(f64, f64)> = Vec::with_capacity(wanted.len());
    for (at, value) in wanted.iter().enumerate() {
        blocks.push((value - shift[at], 1.0));
        while let [.., before, last] = blocks.as_slice()
            && before.0 / before.1 > last.0 / last.1
        {
            let merged = (before.0 + last.0, before.1 + last.1);
            blocks.truncate(blocks.len() - 2);
            blocks.push(merged);
        }
    }
    let mut placed = Vec::with_capacity(wanted.len());
    for (sum, count) in blocks {
        let mut left = count;
        while left > 0.5 {
            placed.push(sum / count + shift[placed.len()]);
            left -= 1.0;
        }
    }
    placed
}

impl Drawing {
    /// The drawing as SVG. `title` names it for a screen reader.
    pub fn svg(&self, nodes: &[Node], title: &str) -> Markup {
        let of =
            |place: usize| -> Vec<&Node> { self.boxes[place].members.iter().map(|&member| &nodes[member]).collect() };
        html! {
            svg.graph width=(px(self.width)) height=(px(self.height))
                viewBox={ "0 0 " (px(self.width)) " " (px(self.height)) } role="group" aria-label=(title) {
                g aria-hidden="true" {
                    @for edge in self.edges_in_order(nodes) {
                        path.edge.(way(&of(edge.from), &of(edge.to))) d=(curve(&edge.points)) {}
                    }
                }
                @for placed in &self.boxes {
                    @let members: Vec<&Node> = placed.members.iter().map(|&member| &nodes[member]).collect();
                    (node_box(placed, &members))
                }
            }
        }
    }

    /// What was taken is drawn last, so that nothing covers it.
    fn edges_in_order(&self, nodes: &[Node]) -> Vec<&Edge> {
        let mut edges: Vec<&Edge> = self.edges.iter().collect();
        edges.sort_by_key(|edge| {
            let of = |place: usize| -> Vec<&Node> { self.boxes[place].members.iter().map(|&m| &nodes[m]).collect() };
            way(&of(edge.from), &of(edge.to)) == "taken"
        });
        edges
    }

    /// How many boxes there are.
    pub fn boxes(&self) -> usize {
        self.boxes.len()
    }
}

fn node_box(placed: &Placed, members: &[&Node]) -> Markup {
    let first = members[0];
    let states: Vec<&str> = members.iter().filter_map(|node| node.state.as_deref()).collect();
    let state = worst(&states);
    let look = state.map_or(Look::NONE, words::step);
    let many = members.len() > 1;
    let name =
        if many { format!("{} ×{}", common_name(members), words::count(members.len())) } else { first.name.clone() };
    let detail = if many { counts(&states) } else { first.detail.clone() };
    let said = match state {
        Some(_) if many => format!("{name}: {detail}"),
        Some(_) => {
            format!("{name}: {}{}", look.word, if detail.is_empty() { String::new() } else { format!(", {detail}") })
        }
        None => name.clone(),
    };
    let (x, y) = (placed.x, placed.y);
    let drawn = html! {
        title { (said) }
        @if many || first.items.is_some() {
            rect.behind x=(px(x + 5.0)) y=(px(y + 4.0)) width=(px(BOX_WIDTH)) height=(px(BOX_HEIGHT)) rx="7" {}
        }
        rect.face x=(px(x)) y=(px(y)) width=(px(BOX_WIDTH)) height=(px(BOX_HEIGHT)) rx="7" {}
        @if let Some(share) = share(first.items, &states, many) {
            rect.share x=(px(x + 12.0)) y=(px(y + BOX_HEIGHT - 6.0)) width=(px((BOX_WIDTH - 24.0) * share)) height="3" rx="1.5" {}
        }
        rect.mark x=(px(x)) y=(px(y + 8.0)) width="4" height=(px(BOX_HEIGHT - 16.0)) rx="2" {}
        text.name x=(px(x + 14.0)) y=(px(y + 20.0)) { (words::clip(&name, 21)) }
        text.detail x=(px(x + 14.0)) y=(px(y + 36.0)) {
            @if state.is_some() { (look.sign) " " }
            (words::clip(&detail, 26))
        }
        @if first.decides && !many {
            text.decides x=(px(x + BOX_WIDTH - 18.0)) y=(px(y + 20.0)) { "◇" }
        }
    };
    let class = look.class;
    html! {
        @if let Some(href) = first.href.as_ref() {
            a.node.(class) href=(href) { (drawn) }
        } @else {
            g.node.(class) { (drawn) }
        }
    }
}

/// The share that has ended, where there is more than one to count.
fn share(items: Option<(i32, i32, i32)>, states: &[&str], many: bool) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "a share for the eye")]
    match items {
        Some((all, ended, _)) if all > 0 => Some(f64::from(ended) / f64::from(all)),
        _ if many && !states.is_empty() => {
            let ended = states.iter().filter(|state| words::step(state).ended).count();
            Some(ended as f64 / states.len() as f64)
        }
        _ => None,
    }
}

/// The one of these states that a person has to know of first.
fn worst<'a>(states: &[&'a str]) -> Option<&'a str> {
    states.iter().copied().max_by_key(|state| words::step(state).weight)
}

fn counts(states: &[&str]) -> String {
    let mut by_word: BTreeMap<(std::cmp::Reverse<u8>, &str), usize> = BTreeMap::new();
    for state in states {
        let look = words::step(state);
        *by_word.entry((std::cmp::Reverse(look.weight), look.word)).or_default() += 1;
    }
    by_word.into_iter().map(|((_, word), n)| format!("{} {word}", words::count(n))).collect::<Vec<_>>().join(", ")
}

/// What the names of a group begin with, else the handler that they share.
fn common_name(members: &[&Node]) -> String {
    let mut common = members[0].name.as_str();
    for node in members {
        let same = common.bytes().zip(node.name.bytes()).take_while(|(a, b)| a == b).count();
        // Names are ASCII; a cut elsewhere would not be a boundary.
        common = common.get(..same).unwrap_or_default();
    }
    let common = common.trim_end_matches(|c: char| c == '_' || c.is_ascii_digit());
    if common.len() >= 3 { common.to_owned() } else { members[0].handler.clone() }
}

/// Whether the task went this way.
fn way(from: &[&Node], to: &[&Node]) -> &'static str {
    let any = |nodes: &[&Node], test: fn(&Look) -> bool| {
        nodes.iter().filter_map(|node| node.state.as_deref()).any(|state| test(&words::step(state)))
    };
    let all = |nodes: &[&Node], state: &str| nodes.iter().all(|node| node.state.as_deref() == Some(state));
    if from[0].state.is_none() {
        "plain"
    } else if all(from, "skipped") || all(to, "skipped") {
        "skipped"
    } else if any(from, |look| look.done) && any(to, |look| look.begun) {
        "taken"
    } else {
        "ahead"
    }
}

/// A line through the points: level through boxes' rows, bent between columns.
fn curve(points: &[(f64, f64)]) -> String {
    use std::fmt::Write as _;
    let Some(((x, y), rest)) = points.split_first() else {
        return String::new();
    };
    let mut path = format!("M{} {}", px(*x), px(*y));
    let (mut last_x, mut last_y) = (*x, *y);
    for &(x, y) in rest {
        // Writing to a string does not fail.
        let _ = if (y - last_y).abs() < 0.5 {
            write!(path, "H{}", px(x))
        } else {
            let half = f64::midpoint(last_x, x);
            write!(path, "C{} {} {} {} {} {}", px(half), px(last_y), px(half), px(y), px(x), px(y))
        };
        (last_x, last_y) = (x, y);
    }
    path
}

/// A length with one digit behind the point, and none where it is zero.
fn px(length: f64) -> String {
    let rounded = (length * 10.0).round() / 10.0;
    rounded.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph(edges: &[&[usize]]) -> Vec<Node> {
        edges
            .iter()
            .enumerate()
            .map(|(index, parents)| Node {
                name: format!("s{index}"),
                handler: format!("h{index}"),
                depends_on: parents.to_vec(),
                ..Node::default()
            })
            .collect()
    }

    #[test]
    fn a_chain_is_a_level_line() {
        let drawing = layout(&graph(&[&[], &[0], &[1]])).unwrap();
        assert!(drawing.boxes.windows(2).all(|pair| (pair[0].y - pair[1].y).abs() < 0.1 && pair[0].x < pair[1].x));
        assert_eq!(drawing.edges.len(), 2);
    }

    #[test]
    fn boxes_never_overlap() {
        // A ladder of layers with edges that skip some.
        let mut edges: Vec<Vec<usize>> = Vec::new();
        for layer in 0..12_usize {
            for place in 0..9 {
                let before = |back: usize, place: usize| (layer.checked_sub(back)).map(|l| l * 9 + place);
                edges.push(
                    [before(1, place), before(1, (place * 5 + 3) % 9), before(3, (place + 1) % 9)]
                        .into_iter()
                        .flatten()
                        .collect(),
                );
            }
        }
        for list in &mut edges {
            list.sort_unstable();
            list.dedup();
        }
        let nodes = graph(&edges.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let drawing = layout(&nodes).unwrap();
        for (at, a) in drawing.boxes.iter().enumerate() {
            for b in &drawing.boxes[at + 1..] {
                let apart = (a.x - b.x).abs() > BOX_WIDTH || (a.y - b.y).abs() >= BOX_HEIGHT;
                assert!(apart, "{a:?} {b:?}");
            }
        }
    }

    #[test]
    fn many_like_steps_are_one_box_with_counts() {
        let mut nodes = graph(&[&[]]);
        for at in 0..2000 {
            nodes.push(Node {
                name: format!("resize_{at}"),
                handler: "images.resize".into(),
                depends_on: vec![0],
                state: Some(if at < 3 { "error" } else { "complete" }.into()),
                ..Node::default()
            });
        }
        nodes.push(Node {
            name: "end".into(),
            handler: "end".into(),
            depends_on: (1..=2000).collect(),
            ..Node::default()
        });
        let drawing = layout(&nodes).unwrap();
        assert_eq!(drawing.boxes(), 3);
        let svg = drawing.svg(&nodes, "steps").into_string();
        assert!(svg.contains("resize ×2,000") && svg.contains("3 failed, 1,997 complete"), "{svg}");
    }

    #[test]
    fn a_graph_of_two_thousand_unlike_steps_is_drawn_and_ten_thousand_are_gathered() {
        let wide = |n: usize| {
            let edges: Vec<Vec<usize>> = (0..n)
                .map(|at| at.checked_sub(50).map_or(Vec::new(), |before| vec![before, before / 50 * 50]))
                .collect();
            graph(
                &edges
                    .iter()
                    .map(|list| if list.len() == 2 && list[0] == list[1] { &list[..1] } else { &list[..] })
                    .collect::<Vec<_>>(),
            )
        };
        assert_eq!(layout(&wide(2000)).unwrap().boxes(), 2000);
        let mut many = wide(10_000);
        for node in &mut many {
            node.handler = "same".into();
        }
        assert_eq!(layout(&many).unwrap().boxes(), 200);
    }

    #[test]
    fn names_are_escaped() {
        let mut nodes = graph(&[&[]]);
        nodes[0].name = "<script>".into();
        nodes[0].href = Some("javascript\"><b>".into());
        let svg = layout(&nodes).unwrap().svg(&nodes, "a \"b\" <c>").into_string();
        assert!(!svg.contains("<script") && !svg.contains("<b>") && !svg.contains("<c>"), "{svg}");
    }
}
