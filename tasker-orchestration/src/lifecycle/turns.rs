//! Whose turn it is among held steps: pure.
//!
//! Priority first; among equally urgent ones the fair keys take turns, beginning behind the one
//! that was served last; within a key the longest ready goes first. What a limit would hold back
//! is passed over, so it is in nobody's way.

use std::cmp::Reverse;
use std::collections::HashMap;

use chrono::{DateTime, Utc};
use tasker_shared::state_machine::flow::{Free, LANE_SEPARATOR};
use tasker_shared::store::flow::Lane;
use uuid::Uuid;

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
    /// It waits in a lane; one that does not and is limited has to be put into one.
    pub in_lane: bool,
}

/// What a lane's name says: its fair key, its handler, its limits.
pub(super) fn parts(lane: &str) -> (&str, &str, impl Iterator<Item = &str>) {
    let mut parts = lane.split(LANE_SEPARATOR);
    (parts.next().unwrap_or_default(), parts.next().unwrap_or_default(), parts)
}

fn left(left: &Left, names: &[String]) -> i64 {
    names.iter().filter_map(|name| left.get(name)).map(Free::left).min().unwrap_or(i64::MAX)
}

/// How many steps to look at in each lane that lets any through, `(place, quota)`: about twice
/// as many as are wanted of all together, the rest comes in the next pass.
pub(super) fn quotas(lanes: &[(Lane, Vec<String>)], limits: &Left, max: usize) -> Vec<(usize, i32)> {
    let open: Vec<(usize, i64)> = (0..).zip(lanes).map(|(place, (_, names))| (place, left(limits, names))).collect();
    let open: Vec<(usize, i64)> = open.into_iter().filter(|(_, left)| *left > 0).collect();
    let share = i64::try_from((max * 2).div_ceil(open.len().max(1))).unwrap_or(i64::MAX).max(1);
    open.into_iter().map(|(place, left)| (place, i32::try_from(left.min(share)).unwrap_or(i32::MAX))).collect()
}

/// Takes at most `max` in turn; `after` is what the last pass answered with. Answers those
/// whose turn it is, in order, and where the next pass goes on.
pub(super) fn take(
    mut candidates: Vec<Candidate>,
    limits: &mut Left,
    after: &str,
    max: usize,
) -> (Vec<Candidate>, Option<String>) {
    candidates.sort_unstable_by_key(|held| (Reverse(held.priority), held.ready_at, held.step));
    let mut rounds: HashMap<(i32, &str), u32> = HashMap::new();
    let mut order: Vec<(Reverse<i32>, u32, bool, &str, usize)> = Vec::with_capacity(candidates.len());
    for (place, candidate) in candidates.iter().enumerate() {
        let round = rounds.entry((candidate.priority, &candidate.fair)).or_default();
        *round += 1;
        let served = *behind(&candidate.fair) <= *after;
        order.push((Reverse(candidate.priority), *round, served, &candidate.fair, place));
    }
    order.sort_unstable();
    let (mut taken, mut next) = (Vec::new(), None);
    for place in order.into_iter().map(|(.., place)| place).collect::<Vec<_>>() {
        let candidate = &candidates[place];
        if taken.len() == max {
            break;
        }
        if left(limits, &candidate.limits) <= 0 {
            // It stands in the way of others until it has a lane.
            if !candidate.in_lane {
                taken.push(candidate.clone());
            }
            continue;
        }
        for name in &candidate.limits {
            if let Some(free) = limits.get_mut(name) {
                free.take();
            }
        }
        next = Some(behind(&candidate.fair));
        taken.push(candidate.clone());
    }
    (taken, next)
}

/// What stands behind every lane of this fair key, and before those of the next.
fn behind(fair: &str) -> String {
    format!("{fair} ")
}

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
            in_lane: true,
        }
    }

    fn steps((taken, _): &(Vec<Candidate>, Option<String>)) -> Vec<u128> {
        taken.iter().map(|candidate| candidate.step.as_u128()).collect()
    }

    fn places(most: &[(&str, i64)]) -> Left {
        let free = |places: &i64| Free { limit_id: 1, places: Some(*places), tokens: None };
        most.iter().map(|(name, places)| ((*name).to_owned(), free(places))).collect()
    }

    #[test]
    fn the_urgent_go_first_and_the_longest_ready_among_them() {
        let held = vec![candidate(3, 0, "", &[]), candidate(2, 5, "", &[]), candidate(1, 5, "", &[])];
        assert_eq!(steps(&take(held, &mut Left::new(), "", 10)), [1, 2, 3]);
    }

    #[test]
    fn keys_take_turns_whatever_they_have_waiting() {
        let mut held: Vec<Candidate> = (1..100).map(|n| candidate(n, 0, "big", &[])).collect();
        held.extend((200..203).map(|n| candidate(n, 0, "small", &[])));
        assert_eq!(steps(&take(held, &mut Left::new(), "", 7)), [1, 200, 2, 201, 3, 202, 4]);
    }

    #[test]
    fn with_room_for_one_at_a_time_each_key_has_its_turn_too() {
        let (mut after, mut served) = (String::new(), Vec::new());
        let mut held: Vec<Candidate> = (1..50).map(|n| candidate(n, 0, "a", &[])).collect();
        held.extend([candidate(60, 0, "b", &[]), candidate(61, 0, "b", &[]), candidate(70, 0, "", &[])]);
        for _ in 0..6 {
            let taken = take(held.clone(), &mut Left::new(), &after, 1);
            served.extend(steps(&taken));
            held.retain(|candidate| candidate.step != taken.0[0].step);
            after = taken.1.unwrap();
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
        let mut limits = places(&[("x", 1), ("y", 0), ("shop", 3)]);
        assert_eq!(steps(&take(held, &mut limits, "", 10)), [1, 4], "z has no row: nobody uses it");
    }

    #[test]
    fn a_limited_step_without_a_lane_is_sent_into_one() {
        let held = vec![Candidate { in_lane: false, ..candidate(1, 0, "", &["shop"]) }, candidate(2, 0, "", &[])];
        assert_eq!(steps(&take(held, &mut places(&[("shop", 0)]), "", 10)), [1, 2]);
    }

    #[test]
    fn lanes_share_what_is_looked_at() {
        let lane = |name: &str| (Lane { priority: 0, lane: name.into() }, vec![name.to_owned()]);
        let lanes = [lane("a"), lane("b"), lane("c")];
        assert_eq!(quotas(&lanes, &places(&[("a", 2), ("b", 0)]), 10), [(0, 2), (2, 10)]);
    }
}
