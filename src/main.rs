//! SSECommander: runs commands over HTTP and streams their output as Server-Sent Events, from the standard library alone.
//!
//! The modules are in reading order; data flows one way, from socket bytes to a request, past the policy to a command, and back as
//! output, events and bytes.
#![deny(unsafe_code)]

// Starting, and the path of a connection.
mod config;
mod server;

// A request, and whether it may be.
mod request;

mod policy;
mod words;

// Its answer, and a command's life.
mod response;
mod run;

mod child;
mod output;

// What the others stand on.
mod listener;

mod clock;
mod log;
#[allow(unsafe_code)]
mod sys;

use config::{Config, Exit, TOKEN_VARIABLE};
use listener::Listener;
use std::{ffi::OsString, io::Write, process::ExitCode};

fn main() -> ExitCode {
    let token = std::env::var_os(TOKEN_VARIABLE);
    sys::normalise_process(TOKEN_VARIABLE);
    let Err(Exit(status, why)) = start(token) else {
        return ExitCode::SUCCESS;
    };
    // Closed streams are no reason for another status.
    let _ = match status {
        0 => write!(std::io::stdout(), "{why}"),
        _ => writeln!(std::io::stderr(), "ssecommander: {why}"),
    };
    ExitCode::from(status)
}

fn start(token: Option<OsString>) -> Result<(), Exit> {
    let lossy = |text: OsString| text.to_string_lossy().into_owned();
    let arguments = std::env::args_os().skip(1).map(lossy);
    let config = Config::parse(arguments, token.map(lossy))?;
    let cannot = |what: String| move |error| Exit(1, format!("cannot {what}: {error}"));
    sys::start_guardian().map_err(cannot("start the guardian".to_string()))?;
    let limits = &config.limits;
    let listening = Listener::bind(&config.address, limits.heartbeat, limits.stall);
    let listener = listening.map_err(cannot(format!("listen on {}", config.address)))?;
    let _ = config.policy.token.clone().map(|it| log::TOKEN.set(it));
    sys::count_signals();
    let name = &listener.name;
    log::line(format_args!("listen address={name}"));
    let _ = writeln!(std::io::stdout(), "ssecommander listening on {name}");
    server::serve(listener, config).map_err(cannot("serve".to_string()))
}
