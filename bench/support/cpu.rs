//! CPU time of a Postgres: of its postmaster's children, from /proc. Called by `idle.rs` and `dashboards.rs`.

use std::fs;

use anyhow::Context;

/// `USER_HZ`: what /proc counts CPU time in.
const TICKS: f64 = 100.0;

/// User and system time of the postmaster's children in seconds, those that have ended included.
pub(crate) fn cpu_of_cluster(postmaster: u32) -> anyhow::Result<f64> {
    let mut ticks = stat(postmaster)?.of_the_dead;
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // It may end while we look.
        if let Ok(stat) = stat(pid)
            && stat.parent == postmaster
        {
            ticks += stat.own;
        }
    }
    Ok(ticks / TICKS)
}

struct Stat {
    parent: u32,
    own: f64,
    of_the_dead: f64,
}

fn stat(pid: u32) -> anyhow::Result<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = text.rsplit_once(") ").context("a process")?;
    let fields: Vec<_> = fields.split(' ').collect();
    let number = |at: usize| -> anyhow::Result<f64> { Ok(fields[at].parse()?) };
    Ok(Stat {
        parent: fields[1].parse()?,
        own: number(11)? + number(12)?,
        of_the_dead: number(13)? + number(14)?,
    })
}
