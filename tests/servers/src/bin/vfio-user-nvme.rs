//! An NVMe controller on a file, as a vfio-user server.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use outboard_servers::nvme::Nvme;
use outboard_servers::options::{Common, Doorbells, log_to_stderr};
use outboard_servers::serve::{Shared, serve};

/// An NVMe controller on a file, as a vfio-user server.
#[derive(Parser)]
struct Options {
    #[command(flatten)]
    common: Common,
    /// The disk: a file whose length is a multiple of 512.
    #[arg(long, value_name = "FILE")]
    disk: PathBuf,
    /// How doorbell writes reach the controller.
    #[arg(long, value_enum, default_value = "mapped")]
    doorbells: Doorbells,
}

fn main() -> ExitCode {
    let options = Options::parse();
    log_to_stderr(options.common.verbose);
    let nvme = match Nvme::new(&options.disk, options.doorbells) {
        Ok(nvme) => nvme,
        Err(error) => {
            eprintln!("{}: {error}", options.disk.display());
            return ExitCode::FAILURE;
        }
    };
    match serve(&Shared::new(nvme), &options.common) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error}", options.common.socket.display());
            ExitCode::FAILURE
        }
    }
}
