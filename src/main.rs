//! SSECommander: runs commands over HTTP and streams their output as Server-Sent Events, from the standard
//! library alone.
//!
//! The modules are in reading order. Data flows one way: from socket bytes to a request, past the policy to a
//! command, and back as output, events and bytes.
#![deny(unsafe_code)]

mod config;
mod supervisor;

mod server;

mod connection;

mod response;

mod policy;
mod request;
mod words;

mod refusal;

mod run;

mod child;
mod pipes;

mod output;
mod processes;

mod clock;
mod log;
#[allow(unsafe_code)]
mod sys;

use config::{Config, Exit, Wish};
use std::{io, io::Write, net::TcpListener, process::ExitCode, thread};

fn main() -> ExitCode {
    match start() {
        Ok(status) => ExitCode::from(status),
        Err(Exit(status, why)) => {
            // A closed stderr is no reason for another status.
            let _ = writeln!(io::stderr(), "ssecommander: {why}");
            ExitCode::from(status)
        }
    }
}

/// Returns the exit status, in the supervisor and in the server.
fn start() -> Result<u8, Exit> {
    let config = match Wish::parse(std::env::args_os().skip(1))? {
        Wish::Print(text) => {
            let _ = write!(io::stdout(), "{text}");
            return Ok(0);
        }
        Wish::Serve(config) => config,
    };
    match supervisor::split().map_err(|error| cannot("start the server's process", &error))? {
        Some(server_s_status) => Ok(server_s_status),
        None => serve(config).map(|()| 0),
    }
}

fn serve(config: Config) -> Result<(), Exit> {
    let listening = TcpListener::bind(config.address);
    let listener = listening
        .map_err(|error| cannot(&format!("listen on http://{}", config.address), &error))?;
    // With the port that was taken where 0 was asked for.
    let address = listener.local_addr().map_err(|error| cannot("listen", &error))?;
    log::start(config.rules.token.as_deref()).map_err(|error| cannot("start a thread", &error))?;
    let blind = if processes::is_known() {
        ""
    } else {
        " why=\"without /proc, what is left after a kill -9 of the server cannot be found\""
    };
    log::line(format_args!("listen address=http://{address}{blind}"));
    // Nobody waits for a stdout that is a full pipe.
    let _ = thread::Builder::new().spawn(move || {
        let _ = writeln!(io::stdout(), "ssecommander listening on http://{address}");
    });
    let served = server::serve(listener, config.rules, config.limits);
    log::finish();
    served.map_err(|error| cannot("serve", &error))
}

/// A failure to start, without the number that std puts behind the system's words.
fn cannot(what: &str, error: &io::Error) -> Exit {
    let text = error.to_string();
    let (words, _) = text.split_once(" (os error").unwrap_or((&text, ""));
    Exit(1, format!("cannot {what}: {words}"))
}
