"""``vllm bench serve`` of an installed release, without the rest of its command line.

The other commands of ``vllm`` import the HTTP server's packages, which the CPU environment leaves
out; the parser and the client are the release's own. Before it runs, vLLM's own command takes the
CPU for the platform where it finds no other; so does this.
"""

from vllm import platforms

if platforms.current_platform.is_unspecified():
    from vllm.platforms.cpu import CpuPlatform

    platforms.current_platform = CpuPlatform()

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
