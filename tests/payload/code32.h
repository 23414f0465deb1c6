/* Included before every file (-include): gcc -m32 writes 32-bit code, the assembler puts
 * it into an ELF64 object (-Wa,--64) and must be told which of the two it is reading. */
#ifndef __ASSEMBLER__
__asm__(".code32");
#endif
