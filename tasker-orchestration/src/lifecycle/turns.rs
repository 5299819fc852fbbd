//! Whose turn it is among held steps: pure.
//!
//! Priority first; among equally urgent ones the fair keys take turns, and whose last turn is
//! longest ago is next; within a key the longest ready goes first. What a limit would hold back
//! is passed over, so it is in nobody's way.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, VecDeque};

use chrono::{DateTime, Utc};
use tasker_shared::state_machine::flow::{Free, GROUP_SEPARATOR};
use uuid::Uuid;

use super::limits::HoldGroup;

/// What limits have left, by name; a limit without a row is not used at all.
pub(super) type Left = HashMap<String, Free>;

/// A held step that may be sent.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Candidate {
    pub task: Uuid,
    pub step: Uuid,
    pub priority: i32,
    pub fair: String,
    pub ready_at: DateTime<Utc>,
    /// The limits that it is subject to.
    pub limits: Vec<String>,
    /// Which quota it came under; one that waits in no hold group and is limited has to be put into one.
    pub quota: Option<usize>,
}

/// What the name of a hold group says: its fair key, its handler, its limits.
pub(super) fn parts(group: &str) -> (&str, &str, impl Iterator<Item = &str>) {
    let mut parts = group.split(GROUP_SEPARATOR);
    (parts.next().unwrap_or_default(), parts.next().unwrap_or_default(), parts)
}

fn left(left: &Left, names: &[String]) -> i64 {
    names.iter().filter_map(|name| left.get(name)).map(Free::left).min().unwrap_or(i64::MAX)
}

/// Who waits for a turn, by priority and fair key, and since which turn.
///
/// A key that comes new, or comes again, stands behind those that wait: were it before them,
/// a stream of keys with one step each would keep a key with many from its turn.
#[derive(Debug, Default)]
pub(super) struct Turns {
    since: HashMap<(i32, String), u64>,
    count: u64,
}

impl Turns {
    /// Notes who waits. `all`: nobody else does, so others are forgotten.
    pub fn note<'a>(&mut self, waiting: impl Iterator<Item = (i32, &'a str)>, all: bool) {
        let mut before = std::mem::take(&mut self.since);
        self.count += 1;
        for (priority, fair) in waiting {
            let key = (priority, fair.to_owned());
            let since = before.remove(&key).unwrap_or(self.count);
            self.since.entry(key).or_insert(since);
        }
        if !all && before.len() < KEPT {
            self.since.extend(before);
        }
    }

    fn since(&self, priority: i32, fair: &str) -> u64 {
        self.since.get(&(priority, fair.to_owned())).copied().unwrap_or(u64::MAX)
    }

    fn serve(&mut self, priority: i32, fair: &str) {
        self.count += 1;
        self.since.insert((priority, fair.to_owned()), self.count);
    }
}

/// Keys that are remembered though this pass did not look at them, at most.
const KEPT: usize = 20_000;

/// How many steps to look at in a hold group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Quota {
    /// The index of the group.
    pub group: usize,
    /// So many.
    pub most: i32,
    /// Its limits would let more through.
    pub more: bool,
}

/// How many steps to look at in each hold group that lets any through: about twice as many as are
/// wanted of all groups of a priority together. Groups come most urgent first.
pub(super) fn quotas(groups: &[(HoldGroup, Vec<String>)], limits: &Left, max: usize) -> Vec<Quota> {
    let open: Vec<(usize, i64)> = (0..).zip(groups).map(|(index, (_, names))| (index, left(limits, names))).collect();
    let open: Vec<(usize, i64)> = open.into_iter().filter(|(_, left)| *left > 0).collect();
    // However many priorities there are, a pass looks at few times what it may send.
    let mut budget = max * 4;
    let mut quotas = Vec::with_capacity(open.len());
    for urgent in open.chunk_by(|one, other| groups[one.0].0.priority == groups[other.0].0.priority) {
        let share = (max * 2).min(budget).div_ceil(urgent.len()).max(1);
        budget = budget.saturating_sub(share * urgent.len());
        let share = i64::try_from(share).unwrap_or(i64::MAX);
        quotas.extend(urgent.iter().map(|(group, left)| Quota {
            group: *group,
            most: i32::try_from(share.min(*left)).unwrap_or(i32::MAX),
            more: share < *left,
        }));
    }
    quotas
}

/// Whose turn it is.
#[derive(Debug, Default)]
pub(super) struct Taken {
    /// In order.
    pub steps: Vec<Candidate>,
    /// There may be others that could have gone too.
    pub more: bool,
}

/// Takes at most `max` in turn. It ends early where it comes to what was not looked at: whatever
/// went beyond that would go before its turn.
pub(super) fn take(
    mut candidates: Vec<Candidate>,
    quotas: &[Quota],
    limits: &mut Left,
    turns: &mut Turns,
    max: usize,
) -> Taken {
    candidates.sort_unstable_by_key(|held| (Reverse(held.priority), held.ready_at, held.step));
    let mut unseen: Vec<i32> = quotas.iter().map(|quota| quota.most).collect();
    let mut taken = Taken::default();
    for urgent in candidates.chunk_by(|one, other| one.priority == other.priority) {
        let priority = urgent[0].priority;
        let mut keys: BTreeMap<&str, VecDeque<&Candidate>> = BTreeMap::new();
        for held in urgent {
            keys.entry(&held.fair).or_default().push_back(held);
        }
        let mut keys: Vec<_> = keys.into_iter().collect();
        keys.sort_by_key(|(fair, _)| turns.since(priority, fair));
        while !keys.is_empty() && !taken.more {
            keys.retain_mut(|(fair, waiting)| {
                if !taken.more
                    && let Some(next) = next_of(waiting, limits)
                {
                    turns.serve(priority, fair);
                    taken.steps.push(next.clone());
                    taken.more = taken.steps.len() >= max;
                    if let Some(index) = next.quota {
                        unseen[index] -= 1;
                        taken.more |= unseen[index] == 0 && quotas[index].more;
                    }
                }
                !waiting.is_empty()
            });
        }
    }
    taken
}

/// The first that its limits let through, or that stands in the way of others until it has a lane.
fn next_of<'a>(waiting: &mut VecDeque<&'a Candidate>, limits: &mut Left) -> Option<&'a Candidate> {
    while let Some(held) = waiting.pop_front() {
        if left(limits, &held.limits) <= 0 {
            if held.quota.is_some() {
                continue;
            }
            return Some(held);
        }
        for name in &held.limits {
            if let Some(free) = limits.get_mut(name) {
                free.take();
            }
        }
        return Some(held);
    }
    None
}

#[cfg(test)]
mod properties;

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(n: u128, priority: i32, fair: &str, limits: &[&str]) -> Candidate {
        Candidate {
            task: Uuid::from_u128(n),
            step: Uuid::from_u128(n),
            priority,
            fair: fair.into(),
            ready_at: DateTime::UNIX_EPOCH + chrono::TimeDelta::seconds(i64::try_from(n).unwrap()),
            limits: limits.iter().map(|name| (*name).to_owned()).collect(),
            quota: Some(0),
        }
    }

    fn take_steps(held: Vec<Candidate>, limits: &mut Left, turns: &mut Turns, max: usize) -> Vec<u128> {
        let quotas = [Quota { group: 0, most: i32::MAX, more: false }];
        turns.note(held.iter().map(|held| (held.priority, held.fair.as_str())), true);
        let taken = take(held, &quotas, limits, turns, max);
        taken.steps.iter().map(|candidate| candidate.step.as_u128()).collect()
    }

    fn slots(most: &[(&str, i64)]) -> Left {
        let free = |slots: &i64| Free { limit_id: 1, slots: Some(*slots), tokens: None };
        most.iter().map(|(name, slots)| ((*name).to_owned(), free(slots))).collect()
    }

    #[test]
    fn the_urgent_go_first_and_the_longest_ready_among_them() {
        let held = vec![candidate(3, 0, "", &[]), candidate(2, 5, "", &[]), candidate(1, 5, "", &[])];
        assert_eq!(take_steps(held, &mut Left::new(), &mut Turns::default(), 10), [1, 2, 3]);
    }

    #[test]
    fn keys_take_turns_whatever_they_have_waiting() {
        let mut held: Vec<Candidate> = (1..100).map(|n| candidate(n, 0, "big", &[])).collect();
        held.extend((200..203).map(|n| candidate(n, 0, "small", &[])));
        let turns = &mut Turns::default();
        assert_eq!(take_steps(held, &mut Left::new(), turns, 7), [1, 200, 2, 201, 3, 202, 4]);
    }

    #[test]
    fn with_room_for_one_at_a_time_each_key_has_its_turn_too() {
        let (mut turns, mut served) = (Turns::default(), Vec::new());
        let mut held: Vec<Candidate> = (1..50).map(|n| candidate(n, 0, "a", &[])).collect();
        held.extend([candidate(60, 0, "b", &[]), candidate(61, 0, "b", &[]), candidate(70, 0, "", &[])]);
        for _ in 0..6 {
            let taken = take_steps(held.clone(), &mut Left::new(), &mut turns, 1);
            held.retain(|candidate| candidate.step.as_u128() != taken[0]);
            served.extend(taken);
        }
        assert_eq!(served, [70, 1, 60, 2, 61, 3]);
    }

    #[test]
    fn what_a_limit_holds_back_is_in_nobodys_way() {
        let held = vec![
            candidate(1, 9, "", &["x"]),
            candidate(2, 9, "", &["x", "shop"]),
            candidate(3, 0, "", &["y", "shop"]),
            candidate(4, 0, "", &["z", "shop"]),
        ];
        let mut limits = slots(&[("x", 1), ("y", 0), ("shop", 3)]);
        let taken = take_steps(held, &mut limits, &mut Turns::default(), 10);
        assert_eq!(taken, [1, 4], "z has no row: nobody uses it");
    }

    #[test]
    fn a_limited_step_without_a_lane_is_sent_into_one() {
        let held = vec![Candidate { quota: None, ..candidate(1, 0, "", &["shop"]) }, candidate(2, 0, "", &[])];
        assert_eq!(take_steps(held, &mut slots(&[("shop", 0)]), &mut Turns::default(), 10), [1, 2]);
    }

    fn group(priority: i32, name: &str) -> (HoldGroup, Vec<String>) {
        (HoldGroup { priority, lane: name.into() }, vec![name.to_owned()])
    }

    #[test]
    fn lanes_share_what_is_looked_at() {
        let groups = [group(0, "a"), group(0, "b"), group(0, "c")];
        let quotas = quotas(&groups, &slots(&[("a", 2), ("b", 0)]), 10);
        let [a, c] = [Quota { group: 0, most: 2, more: false }, Quota { group: 2, most: 10, more: true }];
        assert_eq!(quotas, [a, c]);
    }

    #[test]
    fn one_urgent_lane_among_many_others_is_looked_at_as_far_as_there_is_room() {
        let mut groups = vec![group(9, "urgent")];
        groups.extend((0..50).map(|n| group(0, &format!("k{n:02}"))));
        let quotas = quotas(&groups, &Left::new(), 5);
        assert_eq!(quotas[0].most, 10);
        assert!(quotas[1..].iter().all(|quota| quota.most == 1));
    }

    #[test]
    fn nothing_goes_before_what_was_not_looked_at() {
        let quotas = [Quota { group: 0, most: 2, more: true }, Quota { group: 1, most: 9, more: true }];
        let urgent = |n| Candidate { quota: Some(0), ..candidate(n, 9, "", &[]) };
        let held = vec![urgent(1), urgent(2), Candidate { quota: Some(1), ..candidate(3, 0, "", &[]) }];
        let taken = take(held, &quotas, &mut Left::new(), &mut Turns::default(), 10);
        assert_eq!((taken.steps.len(), taken.more), (2, true), "a third urgent one may wait");
    }

    #[test]
    fn a_stream_of_new_keys_does_not_keep_one_that_waits_from_its_turn() {
        let mut turns = Turns::default();
        let mut held: Vec<Candidate> = (0..9).map(|n| candidate(n, 0, "z", &[])).collect();
        for n in 0..40 {
            held.push(candidate(100 + n, 0, &format!("n{n:02}"), &[]));
            let taken = take_steps(held.clone(), &mut Left::new(), &mut turns, 1);
            held.retain(|candidate| candidate.step.as_u128() != taken[0]);
        }
        let left = held.iter().filter(|candidate| candidate.fair == "z").count();
        assert!(left <= 3, "{left} of 9 wait still");
    }
}
