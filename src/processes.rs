//! The host's processes, as `/proc/*/stat` lists them (proc_pid_stat(5)).
//!
//! Read only when something is to be killed: to find what a command started outside its process group,
//! and all that is left of the server's session once the server has ended.

use std::sync::{Arc, Mutex, PoisonError};
use std::{fs, time::Instant};

#[derive(Clone, Debug, PartialEq)]
pub struct Process {
    pub pid: u32,
    pub parent: u32,
    pub group: u32,
    pub session: u32,
    /// When it started, in clock ticks since the host did. With the number it tells one process from
    /// another that has got its number since.
    pub start: u64,
    /// Dead, but not reaped.
    pub is_zombie: bool,
}

/// Whether `/proc` is there, and shows this process by the number that it has for itself: in the `/proc`
/// of another namespace all numbers mean other processes.
pub fn is_known() -> bool {
    let own = fs::read_link("/proc/self");
    own.is_ok_and(|number| number.as_os_str() == std::process::id().to_string().as_str())
}

/// All processes, in no order; none where [`is_known`] does not hold.
pub fn all() -> Vec<Process> {
    let mut processes = Vec::new();
    if !is_known() {
        return processes;
    }
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // A process may have ended since the folder was read.
        let stat = fs::read(entry.path().join("stat")).unwrap_or_default();
        processes.extend(parse(pid, &stat));
    }
    processes
}

/// The same, as it was at some moment after this call began. Where many clients leave at once, many threads
/// ask at once: one reads, and those that waited for it share what the next one reads.
pub fn recent() -> Arc<Vec<Process>> {
    static LAST: Mutex<Option<(Instant, Arc<Vec<Process>>)>> = Mutex::new(None);
    let asked = Instant::now();
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((begun, processes)) = &*last {
        if *begun > asked {
            return processes.clone();
        }
    }
    let begun = Instant::now();
    let processes = Arc::new(all());
    *last = Some((begun, processes.clone()));
    processes
}

/// Of `all`, those of `session` that are `leader`, or one of `known`, or descend from any of these.
pub fn family(all: &[Process], session: u32, leader: u32, known: &[Process]) -> Vec<Process> {
    let is_root = |process: &Process| {
        let is_known = |other: &Process| other.pid == process.pid && other.start == process.start;
        process.pid == leader || known.iter().any(is_known)
    };
    let (mut family, mut others): (Vec<_>, Vec<_>) =
        all.iter().filter(|process| process.session == session).cloned().partition(is_root);
    // Each round finds the children of those found before, until there are none.
    loop {
        let is_child = |process: &Process| family.iter().any(|found| found.pid == process.parent);
        let (children, rest): (Vec<_>, Vec<_>) = others.into_iter().partition(is_child);
        if children.is_empty() {
            return family;
        }
        family.extend(children);
        others = rest;
    }
}

fn parse(pid: u32, stat: &[u8]) -> Option<Process> {
    // The second field is the program's name in brackets, which may itself hold brackets and blanks.
    let name_end = stat.iter().rposition(|&byte| byte == b')')?;
    let rest = std::str::from_utf8(&stat[name_end + 1..]).ok()?;
    // proc_pid_stat(5) counts from 1; here 0 is its third field, the state.
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let number = |place: usize| fields.get(place)?.parse().ok();
    Some(Process {
        pid,
        parent: number(1)?,
        group: number(2)?,
        session: number(3)?,
        start: fields.get(19)?.parse().ok()?,
        is_zombie: fields[0] == "Z" || fields[0] == "X",
    })
}
