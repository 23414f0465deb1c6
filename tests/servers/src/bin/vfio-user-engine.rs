//! A DMA engine with one of everything, as a vfio-user server.

use std::process::ExitCode;

use clap::Parser;
use outboard_servers::engine::Engine;
use outboard_servers::options::{Common, log_to_stderr};
use outboard_servers::serve::{Shared, serve};

/// A DMA engine with one of everything, as a vfio-user server.
#[derive(Parser)]
struct Options {
    #[command(flatten)]
    common: Common,
}

fn main() -> ExitCode {
    let options = Options::parse();
    log_to_stderr(options.common.verbose);
    let engine = match Engine::new() {
        Ok(engine) => engine,
        Err(error) => {
            eprintln!("no memory for the BARs: {error}");
            return ExitCode::FAILURE;
        }
    };
    match serve(&Shared::new(engine), &options.common) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error}", options.common.socket.display());
            ExitCode::FAILURE
        }
    }
}
