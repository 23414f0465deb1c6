//! Compiles the C programs that stock guests, the lab and backends run to try devices, into `OUT_DIR`.

use std::env;
use std::error::Error;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::Command;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-env-changed=CC");
    let compiler = env::var_os("CC").unwrap_or_else(|| "gcc".into());
    let program = ["-static"];
    compile(&compiler, &program, "backends/guest.c", "guest-program")?;
    compile(&compiler, &program, "backends/keyboard.c", "keyboard-program")?;
    compile(&compiler, &program, "servers/guest.c", "engine-program")?;
    compile(&compiler, &["-shared", "-fPIC"], "backends/spi.c", "spi.so")
}

fn compile(compiler: &OsStr, kind: &[&str], source: &str, name: &str) -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={source}");
    let output = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?).join(name);
    let flags = ["-Os", "-s", "-std=gnu11", "-Wall", "-Wextra"];
    let status = Command::new(compiler).args(kind).args(flags).arg(source).arg("-o").arg(&output).status()?;
    if !status.success() {
        return Err(format!("{} could not build {source}: {status}", compiler.to_string_lossy()).into());
    }
    Ok(())
}
