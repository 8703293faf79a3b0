//! The host's processes, as `/proc/*/stat` lists them (proc_pid_stat(5)).
//!
//! Read only when something is to be killed: to find what a command started outside its process
//! group, and all that is left of the server's session once the server has ended.

use crate::sys::{EMFILE, ENFILE};
use std::sync::{Condvar, Mutex, PoisonError};
use std::{fs, process, time::Instant};

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Process {
    pub pid: u32,
    pub parent: u32,
    pub group: u32,
    pub session: u32,
    /// When it started, in clock ticks since the host did: it tells a process from one that has got
    /// its number since.
    pub start: u64,
    /// Dead, but not reaped.
    pub is_zombie: bool,
}

/// Whether `/proc` is there, and shows this process by the number that it has for itself: in the
/// `/proc` of another namespace all numbers mean other processes.
pub fn is_known() -> bool {
    fs::read_link("/proc/self").ok() == Some(process::id().to_string().into())
}

/// The last reading of all processes.
struct Last {
    begun: Option<Instant>,
    found: Vec<Process>,
    /// Some thread is at the next one.
    is_busy: bool,
}

/// All processes, in no order, each as it was at some moment after this call began; none where
/// [`is_known`] does not hold, or no descriptor is left to read with. Where many clients leave at
/// once, many threads ask at once, and what one of them reads is shared by all that asked before it
/// began.
pub fn all() -> Vec<Process> {
    static LAST: Mutex<Last> = Mutex::new(Last { begun: None, found: Vec::new(), is_busy: false });
    static IS_READ: Condvar = Condvar::new();
    // A reading that began before this does not count; None, where there was no reading yet, is
    // less than any time.
    let asked = Some(Instant::now());
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    while last.begun <= asked && last.is_busy {
        last = IS_READ.wait(last).unwrap_or_else(PoisonError::into_inner);
    }
    if last.begun <= asked {
        last.is_busy = true;
        // Held, the lock would keep back those that need no reading of their own.
        drop(last);
        let (begun, found) = (Some(Instant::now()), read_all());
        last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
        *last = Last { begun, found, is_busy: false };
        IS_READ.notify_all();
    }
    last.found.clone()
}

fn read_all() -> Vec<Process> {
    let mut processes = Vec::new();
    if is_known() {
        for folder in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let stat = match fs::read(folder.path().join("stat")) {
                // Those that were read would make the others look as if they had ended.
                Err(error) if matches!(error.raw_os_error(), ENFILE | EMFILE) => return Vec::new(),
                // Not every folder is a process, and a process may have ended since.
                stat => stat.unwrap_or_default(),
            };
            processes.extend(parse(&String::from_utf8_lossy(&stat)));
        }
    }
    processes
}

/// Of `processes`, `leader` and its group, those of `known` that are still there and the groups
/// that they lead or led, and all that descend from these, the oldest first: as far as they belong
/// to the session that the server leads, and all commands share.
pub fn family(mut processes: Vec<Process>, leader: u32, known: &[Process]) -> Vec<Process> {
    processes.retain(|p| p.session == process::id());
    // Another start time means that the number, as a process's and so as a group's, has been given
    // again.
    let is_same = |k: &&Process| processes.iter().all(|p| p.pid != k.pid || p.start == k.start);
    let known: Vec<_> = known.iter().filter(is_same).collect();
    let is_known = |p: &Process| known.iter().any(|k| k.pid == p.pid || k.pid == p.group);
    let (mut newest, mut others): (Vec<_>, Vec<_>) =
        processes.into_iter().partition(|p| p.pid == leader || p.group == leader || is_known(p));
    // Generation by generation.
    let mut family = Vec::new();
    while !newest.is_empty() {
        let is_child = |p: &Process| newest.iter().any(|parent| parent.pid == p.parent);
        let (children, rest) = others.into_iter().partition(is_child);
        family.append(&mut newest);
        (newest, others) = (children, rest);
    }
    family.sort_unstable_by_key(|p| (p.start, p.pid));
    family
}

/// The fields of a `stat` file. The second is the program's name in brackets, which may itself hold
/// brackets and blanks; here 0 is the one after it, the state.
fn parse(stat: &str) -> Option<Process> {
    let (start, rest) = stat.rsplit_once(") ")?;
    let (pid, _) = start.split_once(' ')?;
    let fields: Vec<&str> = rest.split(' ').collect();
    Some(Process {
        pid: pid.parse().ok()?,
        parent: fields.get(1)?.parse().ok()?,
        group: fields.get(2)?.parse().ok()?,
        session: fields.get(3)?.parse().ok()?,
        start: fields.get(19)?.parse().ok()?,
        // With more threads than the first, which alone has ended then, it lives.
        is_zombie: matches!(fields[0], "Z" | "X") && fields.get(17)?.parse::<u32>().ok()? <= 1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: u32, parent: u32, group: u32, session: u32) -> Process {
        Process { pid, parent, group, session, start: u64::from(pid), is_zombie: false }
    }

    #[test]
    fn names_may_hold_anything() {
        let rest = "1 20 30 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 99 0 0";
        for name in ["sh", "a b", "a) R 7 7 7", "((", ")", "\u{fffd}", ""] {
            let parsed = parse(&format!("10 ({name}) S {rest}\n")).unwrap();
            let expected =
                Process { pid: 10, parent: 1, group: 20, session: 30, start: 99, is_zombie: false };
            assert_eq!(parsed, expected, "{name}");
        }
        assert!(parse(&format!("10 (sh) Z {rest}")).unwrap().is_zombie);
        for broken in ["", "10", "10 (sh)", "10 (sh) ", "10 (sh) S 1 2", "x (sh) S 1 2 3"] {
            assert_eq!(parse(broken), None, "{broken}");
        }
    }

    #[test]
    fn this_process_is_listed() {
        assert!(is_known());
        let own = std::process::id();
        let listed = all().into_iter().find(|process| process.pid == own).unwrap();
        assert_eq!(listed.parent, std::os::unix::process::parent_id());
    }

    #[test]
    fn a_family_is_found_by_its_parents_within_the_session() {
        let own = std::process::id();
        let elsewhere = own + 1;
        let all = vec![
            // Listed before its parent. A child's number can be the lower one, after all have been
            // used once.
            Process { start: 99, ..process(9, 12, 12, own) },
            process(10, 1, 10, own),
            process(11, 10, 10, own),
            process(12, 11, 12, own),
            // What has called setsid, and its own child.
            process(14, 10, 14, elsewhere),
            process(15, 14, 14, elsewhere),
            // Somebody else's.
            process(20, 1, 20, own),
            // Known from before: one is the same, one has got its number since.
            process(30, 1, 30, own),
            process(31, 1, 31, own),
            process(32, 1, 31, own),
            // Of a group whose leader was known, and has ended since.
            process(51, 1, 50, own),
            // Of its group, though its parent is gone.
            process(40, 1, 10, own),
            process(41, 40, 41, own),
        ];
        let other = Process { start: 7, ..process(31, 10, 12, own) };
        let known = [process(30, 10, 30, own), other, process(50, 10, 50, own)];
        let found = family(all, 10, &known);
        let numbers: Vec<u32> = found.iter().map(|process| process.pid).collect();
        assert_eq!(numbers, [10, 11, 12, 30, 40, 41, 51, 9]);
    }
}
