//! Compiles the bare-metal guest of `payload/` into `OUT_DIR/tiny-kernel.elf`. Needs gcc and binutils, nothing else.

use std::env;
use std::error::Error;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// 32-bit code in an ELF64 object, and of the plainest kind: `-march=i386` and no SSE, because some KVMs emulate it
/// instruction by instruction; nothing that wants a C library.
const FLAGS: &[&str] = &[
    "-m32",
    "-Wa,--64",
    "-march=i386",
    "-Os",
    "-std=gnu11",
    "-ffreestanding",
    "-fno-pic",
    "-fomit-frame-pointer",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fno-toplevel-reorder",
    "-fno-tree-loop-distribute-patterns",
    "-fcf-protection=none",
    "-mgeneral-regs-only",
    "-Wall",
    "-Wextra",
    // Registers are addresses that gcc takes for objects of size 0.
    "-Wno-array-bounds",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-s",
    "-Wl,-m,elf_x86_64,-n,--build-id=none,--no-warn-rwx-segments",
];

const SOURCES: &[&str] = &[
    "start.S",
    "payload.c",
    "machine.c",
    "interrupts.c",
    "virtio.c",
    "virtio_pci.c",
    "modes.c",
    "abuse.c",
    "deep.c",
    "pci.c",
];

fn main() -> Result<(), Box<dyn Error>> {
    let source = Path::new("payload");
    let output = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?).join("tiny-kernel.elf");
    println!("cargo::rerun-if-changed=payload");
    println!("cargo::rerun-if-env-changed=CC");

    let compiler = env::var_os("CC").unwrap_or_else(|| "gcc".into());
    let status = Command::new(&compiler)
        .args(FLAGS)
        .arg("-include")
        .arg(source.join("code32.h"))
        .arg("-T")
        .arg(source.join("payload.ld"))
        .args(SOURCES.iter().map(|file| source.join(file)))
        .arg("-o")
        .arg(&output)
        .status()
        .map_err(|error| format!("cannot run {} for the tiny kernel: {error}", compiler.to_string_lossy()))?;
    if !status.success() {
        return Err(
            format!("{} could not build the tiny kernel: {status}", compiler.to_string_lossy()).into()
        );
    }
    let program = ["-static"];
    compile(&compiler, &program, "backends/guest.c", "guest-program")?;
    compile(&compiler, &program, "backends/keyboard.c", "keyboard-program")?;
    compile(&compiler, &program, "servers/guest.c", "engine-program")?;
    compile(&compiler, &["-shared", "-fPIC"], "backends/spi.c", "spi.so")
}

/// What stock guests, the lab, and backends run to try devices, in `OUT_DIR`.
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
