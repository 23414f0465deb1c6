//! The binary `outboard`: a thin caller of the library.

fn main() -> std::process::ExitCode {
    vmm::cli::main()
}
