"""The commands in a line each: ``python -m experiments``."""

COMMANDS = {
    "pretrain_llama": "train a LLaMA on text with a low-rank optimizer",
    "finetune": "fine-tune a pre-trained encoder or LLaMA on a task",
    "generate": "continue a text with a trained model",
    "evaluate": "loss, perplexity and bits per byte of a trained model on a text",
    "export": "write a checkpoint as a Hugging Face directory",
    "compare": "run many methods side by side, with a search over their rates",
    "launch": "start a training command in several processes on this machine",
    "plan_memory": "the memory of a run, beforehand, by optimizer",
}


def main() -> None:
    """Prints the commands."""
    print("Commands, each of which explains its flags with --help:")
    for name, text in COMMANDS.items():
        print(f"  python -m experiments.{name:<15} {text}")


if __name__ == "__main__":
    main()
